"""From a recipe to a folder: open, measure, let the method decide, write, check, measure again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_fuse.card import merge_card, read_license
from hf_fuse.checkpoint.reader import TORCH_NAMES, read_json
from hf_fuse.checkpoint.tokenizer import copy_files, tokenizer_files
from hf_fuse.checkpoint.writer import check_output, exclusive_output
from hf_fuse.compress.edit import Edit, write_weights
from hf_fuse.compress.loading import is_lightened, lighten, renumbered
from hf_fuse.compress.measure import TITLES, measure, print_table
from hf_fuse.compress.recipe import CompressRecipe, load_compress_recipe
from hf_fuse.compress.subject import Subject, open_subject
from hf_fuse.errors import FuseError
from hf_fuse.merge.carry import output_config, write_json
from hf_fuse.merge.finish import RECIPE_FILE, versions
from hf_fuse.recipe import dump_recipe, output_folder

RESULTS, CHART = "compress_results.json", "importance.png"
LIGHTER = (
    "The figures are those of hf_fuse.load_compressed, which leaves out what this checkpoint only holds so that other "
    "loaders understand it. Those get the same output, at the cost of the model before."
)
# Largest difference of logits, relative to the largest logit, that the order of sums explains.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Compressed:
    """What a compression made.

    Attributes:
        output: the folder.
        summary: what was done, in a sentence.
        before, after: ``parameters`` (in memory), ``bytes`` (on disk), ``perplexity``, ``tokens_per_second``.
        facts: what the method measured and chose.
        address: where it was pushed to.
    """

    output: Path
    summary: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    facts: Mapping[str, Any]
    address: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"summary": self.summary, "before": self.before, "after": self.after, **self.facts}

    def print(self, console: Any) -> None:
        print_table(self.before, self.after, console)


def compress(
    recipe: str | Path | dict | CompressRecipe,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    push: str | None = None,
    private: bool | None = None,
) -> Compressed:
    """Compresses a model as a recipe says, into a new folder.

    Before the folder appears, it is loaded again and has to compute what the method measured in memory.

    Args:
        recipe: YAML file, dictionary or CompressRecipe.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"parameters.drop": 4}``.
        overwrite: replace an existing output, in one step, when the new one is complete.
        push: Hub id to push the result to, instead of the recipe's.
        private: make a new repository private.

    Raises:
        FuseError: with one message that says what, where and what to do. No output is left then, an old one is intact.
    """
    recipe = load_compress_recipe(recipe, overrides)
    folder = output_folder(output or recipe.output)
    check_output(folder, overwrite)
    target = _push_target(recipe, push, private)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        result = _run(recipe, open_subject(recipe), folder, overwrite)
    if target is None:
        return result
    from hf_fuse.hub import push as upload

    address = upload(folder, target.repo_id, target=target, commit_message="Push a model compressed with hf_fuse")
    return Compressed(**vars(result) | {"address": address})


def _push_target(recipe: CompressRecipe, push: str | None, private: bool | None) -> Any:
    repo = push or (recipe.push.repo if recipe.push else None)
    if repo is None:
        return None
    from hf_fuse.hub import check_push

    private = private if private is not None or recipe.push is None else recipe.push.private
    return check_push(repo, private=private, revision=recipe.push.revision if recipe.push and not push else None)


def _run(recipe: CompressRecipe, subject: Subject, folder: Path, overwrite: bool) -> Compressed:
    with exclusive_output(folder, overwrite=overwrite) as partial:
        source = subject.checkpoint.folder
        before = measure(subject, lighten(subject.model, source), subject.checkpoint.nbytes)
        edit = recipe.found_method.function(subject, **recipe.options)
        del subject.model  # the method may have changed it, and there may be no room for two
        written = write_weights(subject.checkpoint, edit, partial, recipe.max_shard_bytes)
        written += _write_companions(subject, edit, partial.folder)
        model = subject.load(partial.folder)
        stock_probe = subject.probe(model)
        _check(subject, model, stock_probe, edit.expected)
        _check(subject, lighten(model, partial.folder), subject.probe(model), stock_probe)
        after = measure(subject, model, written)
        result = Compressed(folder, edit.summary, before, after, edit.facts)
        (partial.folder / RESULTS).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        _draw(edit, partial.folder)
        _write_record(recipe, subject, result, partial.folder)
        partial.publish()
    return result


def _check(subject: Subject, model: Any, found: Tensor, expected: Tensor | None) -> None:
    """The written model has to compute what the method had in memory, and the lighter form of it the same."""
    if expected is None:
        return
    stored = {getattr(torch, TORCH_NAMES[info.dtype]) for info in subject.checkpoint.tensors.values() if info.is_float}
    tolerance = max(TOLERANCE[dtype] for dtype in {model.dtype, *stored} if dtype in TOLERANCE)
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    if not difference <= tolerance * max(expected.abs().max().item(), 1.0):
        raise FuseError(
            f"{subject.candidate.name}: the compressed checkpoint does not compute what it should (logits differ by "
            f"{difference:.2g}), so nothing is saved. This architecture may depend on the layers' numbers in a way "
            "that is not known here."
        )


def _write_companions(subject: Subject, edit: Edit, folder: Path) -> int:
    """Config, generation config, tokenizer and further tensors. -> bytes of these."""
    checkpoint = subject.checkpoint
    layers = None if edit.layers is None else [(checkpoint.config, index) for index in edit.layers]
    config = output_config(checkpoint.config, out_dtype=None, layers=layers, vocab_size=None, special_ids={}, tied=None)
    if edit.layers is not None:
        config |= renumbered(config, edit.layers)
    write_json(folder / "config.json", config | edit.config)
    generation = checkpoint.folder / "generation_config.json"
    if generation.exists():
        write_json(folder / generation.name, read_json(generation))
    copy_files(tokenizer_files(checkpoint.folder), checkpoint.folder, folder)
    for name, tensors in edit.files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return sum((folder / name).stat().st_size for name in edit.files)


def _draw(edit: Edit, folder: Path) -> None:
    """The chart, if there is matplotlib (the extra ``plot``) to draw it."""
    if edit.chart is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    edit.chart(path=folder / CHART)


def _write_record(recipe: CompressRecipe, subject: Subject, result: Compressed, folder: Path) -> None:
    """The recipe as it was run, and the card."""
    checkpoint, method = subject.checkpoint, recipe.found_method
    pinned = {"revision": checkpoint.commit} if checkpoint.commit else {}
    update = {"model": recipe.model.model_copy(update=pinned), "output": None, "push": None}
    resolved = recipe.model_copy(update=update | {"provenance": {"versions": versions()}})
    text = dump_recipe(resolved)
    (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    figures = {
        f"{title} {when}": values[key]
        for key, title in TITLES.items()
        for when, values in (("before", result.before), ("after", result.after))
        if key in values
    }
    paper = f" ([paper](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    images = {"importance per layer": CHART} if (folder / CHART).exists() else {}
    card = merge_card(
        {
            "title": result.output.name,
            "method": method.name,
            "summary": f"{checkpoint.repo_id or checkpoint.folder.name}, made smaller. {result.summary}",
            "made": f"Compressed with hf_fuse, method `{method.name}`{paper}.",
            "paper": method.paper,
            "command": "compress",
            "architecture": checkpoint.architecture,
            "recipe_yaml": text,
            "parents": [
                {"ref": checkpoint.ref, "repo_id": checkpoint.repo_id, "commit": checkpoint.commit, "role": "base",
                 "license": read_license(checkpoint.folder)}
            ],
            "warnings": [LIGHTER] if is_lightened(read_json(folder / "config.json"), folder) else [],
            "figures": figures | images,
            "versions": versions(),
            "has_tokenizer": bool(tokenizer_files(folder)),
        }
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
