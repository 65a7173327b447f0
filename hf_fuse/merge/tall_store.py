"""Several fine-tunes in the room of little more than one: base, multi-task vector, and one bit per weight and task.

``compress_tall`` makes the store; ``extract_tall`` (tall_restore.py) restores the model of one task,
``theta_0 + mask_k * tau_M`` (TALL-masks, https://arxiv.org/abs/2405.07813). A store is a folder:

- ``store.json``: what it holds, and which base it needs;
- ``multitask.safetensors``: tau_M, in the base's dtype or the recipe's ``out_dtype``;
- ``mask-<task>.safetensors``: for each tensor the mask's bits as ``uint8 [ceil(N / 8)]``, first element in the lowest
  bit; tensors of one number are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import TORCH_NAMES
from hf_fuse.checkpoint.writer import Layout, PartialFolder, exclusive_output, lay_out
from hf_fuse.errors import OutputError, RecipeError
from hf_fuse.merge.store import STORE_FILE, task_names
from hf_fuse.merge.tall_format import FORMAT, KIND, VECTOR_STEM, fingerprint
from hf_fuse.merge.tall_restore import extract_tall
from hf_fuse.recipe import output_folder

if TYPE_CHECKING:
    from hf_fuse.merge.plan import Plan
    from hf_fuse.merge.sources import Buffers
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.units import Unit
    from hf_fuse.recipe import Recipe

__all__ = ["compress_tall", "extract_tall"]


def compress_tall(
    recipe: str | Path | dict | Recipe,
    output: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    workers: int | None = None,
) -> Path:
    """Compresses fine-tunes of one base into a store. Streams: memory does not grow with the models.

    Args:
        recipe: as for a merge with the method ``consensus`` (which may be left out), of which ``weight``,
            ``mask_scale``, ``density``, ``election`` and ``scope`` count.
        output: the folder to make; else the recipe's.
        tasks: a name for each model; by default the last part of its path.
        overrides: dotted keys that win over the recipe.
        overwrite: replace an existing store.
        allow_pickle: accept ``.bin`` inputs.
        verify: compare Hub inputs with the Hub's hashes first.
        workers: threads.

    Returns:
        The store's folder.

    Raises:
        FuseError: with one message that says what, where and what to do.
    """
    from hf_fuse.merge.plan import plan

    recipe = _loaded(recipe, overrides)
    made = plan(recipe, output=output, overwrite=overwrite, allow_pickle=allow_pickle, verify=verify)
    folder = output_folder(made.recipe.output)
    models = [model for model in made.recipe.models if model.key != made.recipe.base_model.key]
    contents = _Contents.of(made, task_names(models, tasks))
    with ExitStack() as stack:
        partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
        partial.create(contents.layout)
        _fill(made, contents, partial, stack, workers)
        partial.sync()
        _describe(made, contents, partial.folder)
        partial.publish()
    return folder


def _loaded(recipe: str | Path | dict | Recipe, overrides: dict[str, Any] | None) -> Recipe:
    from hf_fuse.recipe import load_recipe

    if isinstance(recipe, dict):
        recipe = {"method": "consensus"} | recipe
    recipe = load_recipe(recipe, overrides)
    if recipe.method != "consensus":
        raise RecipeError(f"method: TALL-masks belong to consensus, the recipe says {recipe.method}. Leave it out.")
    for key in ("slices", "tokenizer", "tie_word_embeddings", "post"):
        if getattr(recipe, key):
            raise RecipeError(f"{key}: a store restores models as they were, so this can't be asked for. Leave it out.")
    said = {key for part in (recipe, *recipe.models) for key in part.parameters}
    if useless := said & {"agreement", "lambda"}:
        raise RecipeError(f"parameters: {min(useless)} has no meaning for a store of masks. Leave it out.")
    return recipe


@dataclass
class _Contents:
    """The store's files: units to merge and to keep, and where their bytes go."""

    tasks: dict[str, str]  # model key -> task
    merged: list[Unit]
    kept: list[Unit]
    layout: Layout
    vector: Layout
    masks: dict[str, Layout]  # by model key

    @classmethod
    def of(cls, made: Plan, tasks: dict[str, str]) -> _Contents:
        from hf_fuse.merge.units import MEAN, MERGE

        merged = [unit for unit in made.units if unit.action == MERGE]
        kept = [unit for unit in made.units if unit.action == MEAN]
        whole = 1 << 62  # one file each
        vector = lay_out(((unit.name, unit.dtype, unit.shape) for unit in merged), whole, VECTOR_STEM)
        masks = {}
        for key, task in tasks.items():
            rows = [(u.name, "U8", (-(-u.numel // 8),)) for u in merged if _position(u, key) is not None]
            rows += [(u.name, "F32", u.shape) for u in kept if _position(u, key) is not None]
            masks[key] = lay_out(rows, whole, f"mask-{task}")
        parts = [vector, *masks.values()]
        headers = {file: header for part in parts for file, header in part.headers.items()}
        sizes = {file: size for part in parts for file, size in part.sizes.items()}
        return cls(tasks, merged, kept, Layout(headers, sizes), vector, masks)


def _position(unit: Unit, key: str) -> int | None:
    return next((k for k, part in enumerate(unit.inputs) if part.key == key), None)


def _fill(made: Plan, contents: _Contents, partial: PartialFolder, stack: ExitStack, workers: int | None) -> None:
    import torch

    from hf_fuse.merge.progress import Progress
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.workers import Workers, World

    dtype = getattr(torch, made.recipe.dtype)
    progress = stack.enter_context(Progress(made.bytes_read * made.passes, quiet=False))
    sources = {key: parent.source for key, parent in made.parents.items()}
    merger = Merger(made.method, sources, contents.merged, dtype, progress=progress)
    pool = Workers(torch.device("cpu"), dtype, workers)
    stack.callback(pool.close)
    merger.measure_model([u for u in contents.merged if merger.scope(u) == "model"], World(size=1, rank=0), pool)
    progress.phase("compress")
    pool.run(merger.jobs(contents.merged), lambda job, buffers, _: _compress(merger, contents, partial, job, buffers))
    pool.run(contents.kept, lambda unit, buffers, _: _keep(merger, contents, partial, unit, buffers))


def _compress(
    merger: Merger, contents: _Contents, partial: PartialFolder, job: tuple[Unit, int, int], buffers: Buffers
) -> None:
    """Writes a piece of one tensor's multi-task vector and masks."""
    import numpy as np
    import torch

    from hf_fuse.merge.methods._masks import multitask_vector, task_mask
    from hf_fuse.merge.sources import BLOCK

    unit, first, last = job
    options = unit.options
    weight = options["weight"]
    thresholds = merger.measure_tensor(unit, buffers) if merger.scope(unit) == "tensor" else merger.states.get("")
    dtype = getattr(torch, TORCH_NAMES[unit.dtype])
    for start, stop in merger.blocks(first, last, BLOCK):
        deltas, _ = merger.block(unit, start, stop, buffers)
        multitask = multitask_vector(deltas, weight, thresholds, options["election"])
        out = multitask.to(dtype)
        if not out.float().sum().isfinite() and not out.isfinite().all():
            raise OutputError(f"tensor {unit.name}: the multi-task vector is not finite in {unit.dtype}.")
        partial.write(contents.vector.places[unit.name], start, memoryview(out.view(torch.uint8).numpy()))
        for k, part in enumerate(unit.inputs):
            mask = task_mask(deltas[k] * weight[k], multitask, options["mask_scale"][k])
            bits = np.packbits(mask.numpy() > 0, bitorder="little")
            partial.write(contents.masks[part.key].places[unit.name], start // 8, memoryview(bits))


def _keep(merger: Merger, contents: _Contents, partial: PartialFolder, unit: Unit, buffers: Buffers) -> None:
    """Single numbers are not worth a mask."""
    values, _ = merger.block(unit, 0, unit.numel, buffers)
    for k, part in enumerate(unit.inputs):
        partial.write(contents.masks[part.key].places[unit.name], 0, memoryview(values[k].float().numpy()).cast("B"))


def _describe(made: Plan, contents: _Contents, folder: Path) -> None:
    from hf_fuse.merge.carry import write_json
    from hf_fuse.merge.finish import resolved_recipe, versions

    recipe = resolved_recipe(made)
    references = {model.key: pinned for model, pinned in zip(made.recipe.models, recipe.models)}
    fields = {"path", "revision", "adapter", "adapter_revision"}
    write_json(
        folder / STORE_FILE,
        {
            "kind": KIND,
            "format": FORMAT,
            "base": recipe.base_model.model_dump(include=fields, exclude_none=True),
            "base_fingerprint": fingerprint(made.reference.checkpoint),
            "multitask": f"{VECTOR_STEM}.safetensors",
            "tasks": {
                task: {
                    "model": references[key].model_dump(include=fields, exclude_none=True),
                    "mask": f"mask-{task}.safetensors",
                }
                for key, task in contents.tasks.items()
            },
            "parameters": recipe.parameters,
            "versions": versions(),
        },
    )
