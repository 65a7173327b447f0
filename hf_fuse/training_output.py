"""The folder of a training run: one rename when all is done, checkpoints to go on from until then.

A run works in ``<output>.partial``. There the Trainer puts its checkpoints, and there the finished model or adapter is
put together; then the folder takes the name of the output, in one step. Stopped or failed runs leave their checkpoints
in it for ``--resume`` and an older output as it was.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_fuse.adapters._peft import METHODS
from hf_fuse.card import merge_card, read_license
from hf_fuse.checkpoint.reader import read_json
from hf_fuse.checkpoint.writer import check_output, leftovers
from hf_fuse.errors import OutputError, RecipeError
from hf_fuse.merge.finish import RECIPE_FILE, versions
from hf_fuse.recipe import dump_recipe, read_yaml
from hf_fuse.training_recipe import DataSource, TrainingRecipe
from hf_fuse.training_setup import Setup

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"  # the last file of a checkpoint: where it is, the checkpoint is complete
RESULTS = "train_results.json"
# What decides which numbers are trained: a run can't go on with others. `train` may change (more epochs).
FIXED = ("model", "adapter", "data", "teacher", "sources")


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of ``folder`` with the most steps."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    complete = [path for path in found if (path / STATE).exists()]
    return max(complete, key=lambda path: int(CHECKPOINT.fullmatch(path.name)[1]), default=None)


def has_checkpoint(folder: Path) -> bool:
    return newest_checkpoint(folder) is not None


def starting_point(output: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises:
        OutputError: the output exists, or an unfinished run does and nobody said what to do with it; nothing to resume.
    """
    check_output(output, overwrite or resume)
    partial, _ = leftovers(output)
    unfinished = newest_checkpoint(partial)
    if not resume:
        if unfinished and not overwrite:
            raise OutputError(
                f"{partial}: an unfinished run left {unfinished.name} there. Go on from it with --resume, or start "
                "again with --overwrite."
            )
        return None
    found = unfinished or newest_checkpoint(output)
    if found is None:
        raise OutputError(
            f"{output}: has no checkpoint to resume from. Leave --resume out. Checkpoints are made as "
            "train.save_strategy and train.save_steps say."
        )
    return found


def check_same_run(checkpoint: Path, recipe: TrainingRecipe) -> None:
    """Whether the run that left ``checkpoint`` trained what ``recipe`` says, as far as its numbers depend on it.

    Raises:
        RecipeError: another model, adapter or data.
    """
    record = checkpoint.parent / RECIPE_FILE
    before = read_yaml(record.read_text(encoding="utf-8"), str(record)) if record.exists() else {}
    now = read_yaml(dump_recipe(recipe))
    for key in FIXED:
        if before and before.get(key) != now.get(key):
            raise RecipeError(
                f"{key} differs from that of the run to resume: it was {_short(before.get(key))}, and is "
                f"{_short(now.get(key))} ({record}). Resume with the same, or start again with --overwrite."
            )


def write_recipe(setup: Setup, folder: Path) -> None:
    """``fuse_recipe.yaml``: what is trained, with Hub models at their commits and the versions that do it."""
    folder.joinpath(RECIPE_FILE).write_text(dump_recipe(_resolved(setup)), encoding="utf-8")


def draw_losses(history: list[dict[str, Any]], folder: Path) -> None:
    """``loss.png`` from the Trainer's log, if there is anything to draw and matplotlib to draw it."""
    series = {
        name: [(entry["step"], entry[key]) for entry in history if key in entry]
        for name, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return
    try:
        import matplotlib  # noqa: F401 - the extra `plot`
    except ImportError:
        return
    from hf_fuse.plot_points import lines

    lines(series, path=folder / "loss.png", title="Loss", xlabel="step", ylabel="loss", logarithmic=False)


def write_card(setup: Setup, folder: Path, results: dict[str, float]) -> None:
    """README.md, in place of the one that PEFT or the Trainer writes."""
    recipe, base = setup.recipe, setup.base
    adapter = read_json(folder / "adapter_config.json") if recipe.trains_adapter else None
    method = adapter["peft_type"].lower() if adapter else "full fine-tuning"
    what = f"An adapter of the kind {method}" if adapter else "The whole model"
    facts = ", ".join(f"{value:,} {name}" for name, value in setup.data.facts.items())
    if teachers := [*(recipe.teacher or []), *(source.path for source in recipe.sources or [])]:
        facts += f", learning from {', '.join(Path(name).name for name in teachers)} too"
    info: dict[str, Any] = {
        "title": Path(recipe.output).name,
        "method": method,
        "summary": f"{base.repo_id or Path(base.ref).name} trained on {', '.join(map(data_name, recipe.data.train))}.",
        "made": f"{what} was trained with hf_fuse on {facts}.",
        "architecture": None if adapter else read_json(folder / "config.json")["architectures"][0],
        "command": "train",
        "recipe_yaml": dump_recipe(_without_paths(_resolved(setup))),
        "datasets": [source.path for source in recipe.data.train if on_hub(source)],
        "parents": [
            {"ref": base.ref, "repo_id": base.repo_id, "commit": base.commit, "role": "base",
             "license": read_license(base.folder)}
        ],
        "warnings": setup.data.notes,
        "figures": results | {path.stem.replace("_", " "): path.name for path in sorted(folder.glob("*.png"))},
        "versions": _versions(),
        "has_tokenizer": setup.kind != "images",
    }  # fmt: skip
    if adapter:
        ours = method in METHODS
        info["adapter"] = {"base": base.repo_id, "task_type": adapter["task_type"], "ours": ours}
    (folder / "README.md").write_text(merge_card(info), encoding="utf-8")


def on_hub(source: DataSource) -> bool:
    return HUB_ID.fullmatch(source.path) is not None and not Path(source.path).exists()


def data_name(source: DataSource) -> str:
    return source.path if on_hub(source) else Path(source.path).name


def _without_paths(recipe: TrainingRecipe) -> TrainingRecipe:
    """Local models and data by their names only: a card is published, the layout of somebody's disk is not."""

    def named(source: DataSource) -> DataSource:
        return source.model_copy(update={"path": data_name(source)})

    def last(path: str | None) -> str | None:
        return Path(path).name if path and Path(path).expanduser().is_dir() else path

    data = recipe.data.model_copy(update={"train": [named(source) for source in recipe.data.train]})
    for key in ("eval", "replay"):
        if sources := getattr(data, key):
            data = data.model_copy(update={key: [named(source) for source in sources]})
    options = {key: last(value) if key == "old_model" else value for key, value in recipe.train.items()}
    model = recipe.model.model_copy(update={"path": last(recipe.model.path)})
    if model.adapter:
        model = model.model_copy(update={"adapter": last(model.adapter)})
    teacher = recipe.teacher and [last(name) for name in recipe.teacher]
    sources = recipe.sources and [s.model_copy(update={"path": last(s.path)}) for s in recipe.sources]
    return recipe.model_copy(
        update={"model": model, "data": data, "train": options, "teacher": teacher, "sources": sources}
    )


def _resolved(setup: Setup) -> TrainingRecipe:
    """What was trained. Where it went and on how many processes is left out: it is no part of what was made."""
    left_out = dict.fromkeys(("output", "push", "num_processes", "accelerate_config"))
    return setup.recipe.model_copy(update=left_out | {"provenance": {"versions": _versions()}})


def _versions() -> dict[str, str]:
    return versions() | {name: version(name) for name in ("peft", "accelerate", "datasets")}


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
