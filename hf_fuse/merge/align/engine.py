"""From a recipe to a folder: open, match, write, check that the aligned model computes what it did."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_fuse.card import merge_card, read_license
from hf_fuse.checkpoint.reader import Checkpoint, open_checkpoint, read_json, text_part
from hf_fuse.checkpoint.tokenizer import copy_files, tokenizer_files
from hf_fuse.checkpoint.writer import check_output, exclusive_output
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.evaluation_models import check_device
from hf_fuse.merge.align.alignment import Alignment, write_aligned, write_fused
from hf_fuse.merge.align.live import LivePair, batches, check_same, encoded, load_model, logits, reorder
from hf_fuse.merge.align.maps import Maps
from hf_fuse.merge.align.pair import Pair, check_pair
from hf_fuse.merge.align.path import barrier, check_loss, draw_path, loss_path
from hf_fuse.merge.align.recipe import AlignRecipe, load_align_recipe
from hf_fuse.merge.align.report import CHART, PATH_CHART, RESULTS, Aligned, draw
from hf_fuse.merge.align.spaces import Spaces, spaces_of
from hf_fuse.merge.carry import output_config, write_json
from hf_fuse.merge.finish import RECIPE_FILE, versions
from hf_fuse.merge.workers import World
from hf_fuse.recipe import ModelRef, dump_recipe, output_folder
from hf_fuse.training_data import read_rows


def align(
    recipe: str | Path | dict | AlignRecipe,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Aligned:
    """Puts the units of a model into the order of a reference's, so that a merge of the two makes sense.

    The output is the same model with its units in another order: a merge reads it like any other. Methods that change
    widths or mix units write the merged model instead. The order is kept beside it, in ``alignment/``.

    Args:
        recipe: YAML file, dictionary or AlignRecipe.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"parameters.sweeps": 4}``.
        overwrite: replace an existing output, in one step, when the new one is complete.

    Raises:
        FuseError: with one message that says what, where and what to do. No output is left then, an old one is intact.
    """
    recipe = load_align_recipe(recipe, overrides)
    folder = output_folder(output or recipe.output)
    if World().size > 1:
        raise RecipeError("align: runs in one process. Start it without a launcher.")
    check_output(folder, overwrite)
    check_device(recipe.device)
    pair = open_pair(recipe)
    with exclusive_output(folder, overwrite=overwrite) as partial, contextlib.closing(pair.pool):
        found = recipe.found_method.function(pair, **recipe.options)
        pair.live = None  # there may be no room for what follows
        difference = found.difference
        if found.fused is None:
            write_aligned(pair.moved, pair.spaces[0], found, partial, recipe.max_shard_bytes)
            _write_companions(pair.moved, found, partial.folder)
            if recipe.verify:
                difference = _verified(recipe, pair, partial.folder)
            if recipe.path:
                found = replace(found, facts={**found.facts, **_paths(recipe, pair, partial.folder)})
        else:
            write_fused(pair.reference, found, partial, recipe.max_shard_bytes)
            _write_companions(pair.reference, found, partial.folder)
            if recipe.verify:
                _check_runs(recipe, pair, partial.folder)
        partial.sync()
        result = Aligned(folder, recipe.method, found, difference)
        (partial.folder / RESULTS).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        draw(result, partial.folder / CHART)
        _write_record(recipe, pair, result, partial.folder)
        partial.publish()
    return result


def open_pair(recipe: AlignRecipe) -> Pair:
    """Finds both models and reads headers, data and tokenizer; weights only if the method runs the models.

    Raises:
        CheckpointError: no such model, damaged, or of other widths than the method can match.
        FuseError: an architecture that is not known, two that do not fit, or anything wrong with the data.
    """
    checkpoints = [
        open_checkpoint(ref.path, ref.revision) for ref in (recipe.model, recipe.reference) if ref is not None
    ]
    moved, reference = checkpoints[0], checkpoints[-1]
    spaces = (spaces_of(moved), spaces_of(reference))
    module = recipe.found_method.module
    check_pair(moved, reference, spaces, same_widths=getattr(module, "SAME_WIDTHS", True))
    check = getattr(module, "check", None)
    pair = Pair(moved, reference, spaces, recipe.seed)
    if check:
        check(pair, **recipe.options)
    if recipe.verify:
        pair.verify = lambda maps: _reordered(recipe, moved, spaces[0], maps)
    if recipe.data:
        _check_inputs(moved, reference)
        rows = read_rows(recipe.data_entry)
        if recipe.path:
            check_loss(reference.architecture, rows.format == "classification")
        pair.data = encoded(rows, recipe, reference)
        if module.needs_data(recipe.options):
            models = tuple(_loaded(recipe, checkpoint, checkpoint.folder) for checkpoint in (moved, reference))
            pair.live = LivePair(models, spaces, pair.data, recipe.batch_size)
    return pair


def _check_inputs(moved: Checkpoint, reference: Checkpoint) -> None:
    """Raises CheckpointError if the models can't read the same data."""
    for key in ("vocab_size", "image_size", "num_channels"):
        one, other = (text_part(checkpoint.config).get(key) for checkpoint in (moved, reference))
        if one != other:
            raise CheckpointError(
                f"{moved.ref} has {key} {one}, {reference.ref} has {other}: to be watched on data, models must read "
                "the same. Use weight_matching without data."
            )


def _loaded(recipe: AlignRecipe, checkpoint: Checkpoint, folder: Path) -> Any:
    return load_model(folder, checkpoint.architecture, recipe.device, recipe.dtype, checkpoint.ref)


def _reordered(recipe: AlignRecipe, checkpoint: Checkpoint, spaces: Spaces, maps: Maps) -> float:
    """Loads a model and compares its logits before and after its units are put into another order in memory."""
    model = _loaded(recipe, checkpoint, checkpoint.folder)
    before = logits(model, recipe.seed)
    reorder(model, spaces, maps)
    return check_same(before, logits(model, recipe.seed), model.dtype, checkpoint.ref)


def _verified(recipe: AlignRecipe, pair: Pair, folder: Path) -> float:
    """Loads the model as it was and as it is written, one after the other, and compares their logits."""
    before = logits(_loaded(recipe, pair.moved, pair.moved.folder), recipe.seed)
    model = _loaded(recipe, pair.moved, folder)
    return check_same(before, logits(model, recipe.seed), model.dtype, pair.moved.ref)


def _paths(recipe: AlignRecipe, pair: Pair, folder: Path) -> dict[str, Any]:
    """The loss between the reference and the model before and after, drawn as well."""
    reference = _loaded(recipe, pair.reference, pair.reference.folder)
    paths = {}
    for when, where in (("before", pair.moved.folder), ("after", folder)):
        other = _loaded(recipe, pair.moved, where)
        paths[when] = loss_path(
            reference, other, lambda: batches(pair.data, recipe.batch_size), recipe.path, f"path {when}"
        )
    draw_path(paths, folder / PATH_CHART)
    return {f"barrier_{when}": barrier(one) for when, one in paths.items()} | {"paths": paths}


def _check_runs(recipe: AlignRecipe, pair: Pair, folder: Path) -> None:
    """Loads the merged model, whose widths may be new to its class, and looks at its logits."""
    if not logits(_loaded(recipe, pair.reference, folder), recipe.seed).isfinite().all():
        raise FuseError(f"{pair.reference.ref}: the logits of the merged model are not finite, so nothing is saved.")


def _write_companions(checkpoint: Checkpoint, found: Alignment, folder: Path) -> None:
    """Config, generation config, tokenizer and image processor."""
    config = output_config(checkpoint.config, out_dtype=None, layers=None, vocab_size=None, special_ids={}, tied=None)
    write_json(folder / "config.json", config | dict(found.fused.config if found.fused else {}))
    for name in ("generation_config.json", "preprocessor_config.json"):
        if (checkpoint.folder / name).exists():
            write_json(folder / name, read_json(checkpoint.folder / name))
    copy_files(tokenizer_files(checkpoint.folder), checkpoint.folder, folder)


def _write_record(recipe: AlignRecipe, pair: Pair, result: Aligned, folder: Path) -> None:
    """The recipe as it was run, and the card."""

    def pinned(ref: ModelRef | None, checkpoint: Checkpoint) -> ModelRef | None:
        update = {"revision": checkpoint.commit} if checkpoint.commit else {}
        return ref and ref.model_copy(update=update)

    update: dict[str, Any] = {"model": pinned(recipe.model, pair.moved), "output": None}
    update |= {"reference": pinned(recipe.reference, pair.reference)} if recipe.reference else {}
    recipe = recipe.model_copy(update=update | {"provenance": {"versions": versions()}})
    text = dump_recipe(recipe)
    (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    method = recipe.found_method
    paper = f" ([paper](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    used = [pair.moved, pair.reference] if recipe.reference else [pair.moved]
    parents = [
        {
            "ref": one.ref,
            "repo_id": one.repo_id,
            "commit": one.commit,
            "role": role,
            "license": read_license(one.folder),
        }
        for one, role in zip(used, ("model", "base"))
    ]
    charts = {"fit by layer": CHART, "loss between the models": PATH_CHART}
    card = merge_card(
        {
            "title": result.output.name,
            "method": method.name,
            "summary": result.summary(pair),
            "made": f"Aligned with hf_fuse, method `{method.name}`{paper}.",
            "paper": method.paper,
            "command": "align",
            "architecture": pair.moved.architecture,
            "recipe_yaml": dump_recipe(_without_paths(recipe)),
            "parents": parents,
            "warnings": [],
            "figures": {title: name for title, name in charts.items() if (folder / name).exists()},
            "versions": versions(),
            "has_tokenizer": bool(tokenizer_files(folder)),
        }
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _without_paths(recipe: AlignRecipe) -> AlignRecipe:
    """Local folders and files by their names only: a card is published, the layout of somebody's disk is not."""

    def named(path: str) -> str:
        return Path(path).name if Path(path).expanduser().exists() else path

    update: dict[str, Any] = {"model": recipe.model.model_copy(update={"path": named(recipe.model.path)})}
    if recipe.reference:
        update["reference"] = recipe.reference.model_copy(update={"path": named(recipe.reference.path)})
    if recipe.data:
        update["data"] = [one.model_copy(update={"path": named(one.path)}) for one in recipe.data]
    if "alignment" in recipe.parameters:
        update["parameters"] = recipe.parameters | {"alignment": named(recipe.parameters["alignment"])}
    return recipe.model_copy(update=update)
