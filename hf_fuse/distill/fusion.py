"""``hf-fuse fuse``: teach, fuse pairwise, merge: one model from several that share neither sizes nor tokenizers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fuse.card import merge_card, read_license
from hf_fuse.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from hf_fuse.checkpoint.writer import check_output, exclusive_output, leftovers, remove_tree
from hf_fuse.distill.fusion_recipe import FusedModel, FusionRecipe, load_fusion_recipe
from hf_fuse.distill.teach import say, teach
from hf_fuse.distill.tokenizer_report import compare_tokenizers
from hf_fuse.errors import FuseError, OutputError, RecipeError
from hf_fuse.merge.finish import RECIPE_FILE, versions
from hf_fuse.recipe import ModelRef, dump_recipe, output_folder, read_yaml
from hf_fuse.training_output import newest_checkpoint
from hf_fuse.training_recipe import TrainingRecipe

# What is in an unfinished output: the recipe as it was started, the teachers' caches, the targets, and their merge.
RECORD, CACHES, TARGETS, MERGED = "fusion.yaml", "caches", "targets", "merged"
RESULTS = "fuse_results.json"
OBJECTIVES = {"task": 0.9, "fuse_llm": 0.1}
ROWS_COMPARED = 200


@dataclass(frozen=True)
class FusionResult:
    """What a fusion made.

    Attributes:
        output: the folder.
        figures: of each target, by the name of its source: what its training measured, and the share of the pivot's
            predictions that the source has a place for (``aligned with ...``).
    """

    output: Path
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.output), "targets": self.figures}


def fuse(
    recipe: str | Path | dict | FusionRecipe,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> FusionResult:
    """Fuses the knowledge of several language models into one of the pivot's size and tokenizer.

    The stages: each model reads the text once and leaves its predictions (``hf-fuse teach``); copies of the pivot learn
    from them (``hf-fuse train``); the copies are merged (``hf-fuse merge``). No two models are in memory together but
    those of a merge, which are streamed. The output appears when all is done; until then what is finished waits in
    ``<output>.partial`` for ``resume``, checkpoints of a training included.

    Args:
        recipe: YAML file, dictionary or FusionRecipe.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"train.learning_rate": 5e-6}``.
        overwrite: replace an existing output, in one step, when the new one is complete; drop an unfinished run.
        resume: go on with an unfinished run of the same recipe.

    Raises:
        FuseError: with one message that says what, where and what to do. An old output is intact then.
    """
    recipe = load_fusion_recipe(recipe, overrides)
    folder = output_folder(output or recipe.output)
    check_output(folder, overwrite)
    partial, _ = leftovers(folder)
    recipe = _pinned(recipe)
    record = dump_recipe(recipe.model_copy(update={"output": None, "provenance": None}))
    _check_unfinished(partial, record, overwrite=overwrite, resume=resume)
    aligned = _check(recipe, partial)
    with exclusive_output(folder, overwrite=overwrite, keep=_has_record) as unfinished:
        if not resume:
            remove_tree(partial)
        partial.mkdir(exist_ok=True)
        (partial / RECORD).write_text(record, encoding="utf-8")
        if not (partial / RESULTS).exists():
            _make(recipe, aligned, partial)
        # Not before, since it is what to go on from; and not after: an output is complete or not there.
        for name in (CACHES, *([] if recipe.keep_targets else [TARGETS])):
            remove_tree(partial / name)
        unfinished.publish()
    (folder / RECORD).unlink()
    return FusionResult(folder, read_json(folder / RESULTS))


def _make(recipe: FusionRecipe, aligned: dict[int, float], partial: Path) -> None:
    """All stages that no earlier run has finished; ``RESULTS`` is there when the last one is."""
    for path in partial.iterdir():
        if path.name not in (RECORD, CACHES, TARGETS):  # of a finish that was not reached
            remove_tree(path)
    caches = [_taught(recipe, number, partial) for number in range(len(recipe.sources) + 1)]
    targets = [_trained(recipe, numbers, caches, partial) for numbers in _groups(recipe)]
    figures = {}
    for target, numbers in zip(targets, _groups(recipe)):
        shares = {f"aligned with {_named(recipe, number)}": aligned[number] for number in numbers}
        measured = read_json(target / "train_results.json").items()
        figures[target.name] = shares | {key: value for key, value in measured if key.startswith(("train_", "eval_"))}
    _merge(recipe, targets, partial)
    _finish(recipe, partial, figures)


def _pinned(recipe: FusionRecipe) -> FusionRecipe:
    """Hub models at their commits, so that an unfinished run goes on with the same ones."""

    def at_commit(model: Any) -> Any:
        commit = open_checkpoint(model.path, model.revision).commit
        return model.model_copy(update={"revision": commit}) if commit else model

    update = {"pivot": at_commit(recipe.pivot), "sources": [at_commit(source) for source in recipe.sources]}
    return recipe.model_copy(update=update)


def _check_unfinished(partial: Path, record: str, *, overwrite: bool, resume: bool) -> None:
    found = _has_record(partial)
    if resume and not found:
        raise OutputError(f"{partial}: there is no unfinished run to resume. Leave --resume out.")
    if found and not (resume or overwrite):
        raise OutputError(
            f"{partial}: an unfinished run left it. Go on with it with --resume, or start again with --overwrite."
        )
    if resume and read_yaml((partial / RECORD).read_text(encoding="utf-8")) != read_yaml(record):
        raise RecipeError(
            f"{partial / RECORD}: the unfinished run had another recipe. Resume with the same, or start again with "
            "--overwrite."
        )


def _has_record(partial: Path) -> bool:
    return (partial / RECORD).exists()


def _check(recipe: FusionRecipe, partial: Path) -> dict[int, float]:
    """All that can be wrong with models and data, before anything is computed.

    Returns:
        For each source, which share of the pivot's predictions it has a place for, in the first rows.
    """
    from hf_fuse.training_setup import prepare

    if recipe.strategy == "pairwise" and len(recipe.sources) == 1:
        say("note: with one source there is nothing to merge: the output is its target.")
    models = [_model(recipe, number) for number in range(len(recipe.sources) + 1)]
    sources = [{"path": model.path, "revision": model.revision, "k": recipe.k} for model in models]
    prepare(_training(recipe, sources), partial)
    shares = {}
    for number in range(len(recipe.sources) + 1):
        # Beside the caches that a run makes, so that no unfinished one is in the way.
        teach(_teaching(recipe, number), partial / "checked", dry_run=True)
        if not number:
            continue
        pivot, source = (_model(recipe, n) for n in (0, number))
        found = compare_tokenizers(
            pivot.key, source.key, recipe.data, vocabulary=recipe.vocabulary, align=recipe.align, limit=ROWS_COMPARED,
            chat_templates=(pivot.chat_template, source.chat_template),
        )  # fmt: skip
        say(f"{_named(recipe, number)}: has a place for {found.aligned:.1%} of the pivot's predictions")
        if not found.aligned:
            raise FuseError(f"{source.key}: reads no text as far as the pivot does anywhere. Choose another source.")
        shares[number] = found.aligned
    return shares


def _groups(recipe: FusionRecipe) -> list[list[int]]:
    """Which sources each target learns from, beside the pivot."""
    everyone = list(range(1, len(recipe.sources) + 1))
    return [everyone] if recipe.strategy == "together" else [[number] for number in everyone]


def _model(recipe: FusionRecipe, number: int) -> FusedModel:
    """The pivot is number 0."""
    if number:
        return recipe.sources[number - 1]
    pivot = ModelRef(path=recipe.pivot.path, revision=recipe.pivot.revision)
    return FusedModel(**pivot.model_dump(), chat_template=recipe.data.chat_template)


def _named(recipe: FusionRecipe, number: int) -> str:
    return f"{number}-{Path(_model(recipe, number).path).name}"


def _teaching(recipe: FusionRecipe, number: int) -> dict[str, Any]:
    model = _model(recipe, number)
    data = recipe.data.model_copy(update={"chat_template": model.chat_template})
    return {
        "teacher": model.model_dump(exclude={"chat_template"}, exclude_none=True),
        "data": data.model_dump(exclude_none=True), "k": recipe.k, "batch_size": recipe.batch_size,
        "device": recipe.device,
    }  # fmt: skip


def _taught(recipe: FusionRecipe, number: int, partial: Path) -> Path:
    cache = partial / CACHES / _named(recipe, number)
    resume = any(leftovers(cache)[0].glob("predictions-*.safetensors"))
    return teach(_teaching(recipe, number), cache, resume=resume).output


def _training(recipe: FusionRecipe, sources: list[dict[str, Any]]) -> TrainingRecipe:
    return TrainingRecipe.model_validate(
        {
            "model": recipe.pivot.model_dump(exclude_none=True),
            "data": recipe.data.model_dump(exclude_none=True),
            "sources": sources or None,
            "train": {"objectives": OBJECTIVES} | recipe.train,
            "num_processes": recipe.num_processes,
            "accelerate_config": recipe.accelerate_config,
        }
    )


def _trained(recipe: FusionRecipe, numbers: list[int], caches: list[Path], partial: Path) -> Path:
    from hf_fuse.train import train

    target = partial / TARGETS / ("target" if recipe.strategy == "together" else _named(recipe, numbers[0]))
    if target.exists():
        return target
    sources = [
        {
            "path": str(caches[number]), "tokenizer": _model(recipe, number).path,
            "revision": _model(recipe, number).revision, "chat_template": _model(recipe, number).chat_template,
            "vocabulary": recipe.vocabulary, "align": recipe.align, "collisions": recipe.collisions,
        }
        for number in (0, *numbers)
    ]  # fmt: skip
    resume = newest_checkpoint(leftovers(target)[0]) is not None
    train(_training(recipe, sources), output=target, resume=resume, overwrite=not resume)
    for checkpoint in target.glob("checkpoint-*"):
        remove_tree(checkpoint)
    return target


def _merge(recipe: FusionRecipe, targets: list[Path], partial: Path) -> None:
    """The targets' merge, or the one target, as the files of ``partial`` itself."""
    from hf_fuse.merge.engine import merge

    merged = partial / MERGED
    if len(targets) == 1:
        shutil.copytree(targets[0], merged)
    else:
        pivot = recipe.pivot.model_dump(include={"path", "revision"}, exclude_none=True)
        parts = {"base_model": pivot, "models": [{"path": str(target)} for target in targets]}
        merge({"method": recipe.merge.method, "parameters": recipe.merge.parameters, **parts}, merged)
    for path in merged.iterdir():
        path.rename(partial / path.name)
    merged.rmdir()


def _finish(recipe: FusionRecipe, partial: Path, figures: dict[str, dict[str, float]]) -> None:
    for name in ("train_results.json", "trainer_state.json", "loss.png"):
        (partial / name).unlink(missing_ok=True)
    text = dump_recipe(recipe.model_copy(update={"output": None, "provenance": {"versions": versions()}}))
    (partial / RECIPE_FILE).write_text(text, encoding="utf-8")
    (partial / "README.md").write_text(_card(recipe, partial, figures), encoding="utf-8")
    unfinished = partial / f"{RESULTS}.unfinished"
    unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(partial / RESULTS)


def _card(recipe: FusionRecipe, folder: Path, figures: dict[str, dict[str, float]]) -> str:
    opened = [
        open_checkpoint(_model(recipe, n).path, _model(recipe, n).revision) for n in range(len(recipe.sources) + 1)
    ]
    names = [checkpoint.repo_id or checkpoint.folder.name for checkpoint in opened]
    local = [model.model_copy(update={"path": name}) for model, name in zip([recipe.pivot, *recipe.sources], names)]
    published = recipe.model_copy(
        update={"pivot": local[0], "sources": local[1:], "output": None, "data": _data_by_name(recipe)}
    )
    method = "fusechat" if recipe.strategy == "pairwise" and len(recipe.sources) > 1 else "fusellm"
    how = f", merged with {recipe.merge.method}" if method == "fusechat" else ""
    return merge_card(
        {
            "title": folder.name.removesuffix(".partial"),
            "method": method,
            "summary": f"{names[0]} with knowledge of {', '.join(names[1:])}.",
            "made": f"Copies of {names[0]} learnt from the predictions of the others with hf_fuse{how}.",
            "paper": "https://arxiv.org/abs/2408.07990" if method == "fusechat" else "https://arxiv.org/abs/2401.10491",
            "command": "fuse",
            "architecture": read_json(folder / "config.json")["architectures"][0],
            "recipe_yaml": dump_recipe(published),
            "parents": [_parent(checkpoint, number) for number, checkpoint in enumerate(opened)],
            "figures": {f"{name}: {key}": value for name, each in figures.items() for key, value in each.items()},
            "versions": versions(),
        }
    )


def _parent(checkpoint: Checkpoint, number: int) -> dict[str, Any]:
    return {
        "ref": checkpoint.ref, "repo_id": checkpoint.repo_id, "commit": checkpoint.commit,
        "role": "model" if number else "base", "license": read_license(checkpoint.folder),
    }  # fmt: skip


def _data_by_name(recipe: FusionRecipe) -> Any:
    """A card is published, the layout of somebody's disk is not."""
    from hf_fuse.training_output import data_name

    def named(sources: list | None) -> list | None:
        return sources and [source.model_copy(update={"path": data_name(source)}) for source in sources]

    return recipe.data.model_copy(update={"train": named(recipe.data.train), "eval": named(recipe.data.eval)})
