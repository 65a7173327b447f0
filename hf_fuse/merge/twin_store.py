"""One merged model and, of each fine-tune, what is its own: a low-rank difference from the merged model.

The static half of Twin-Merging (https://arxiv.org/abs/2406.15479): shared knowledge ``theta_s`` is any merge of the
fine-tunes, exclusive knowledge is ``v_k = theta_k - theta_s``, of which each matrix keeps its strongest singular
triplets. ``theta_s + sum_k w_k v_k`` is one fine-tune again (w = 1 for it alone), or a mix. A store is a folder:

- ``store.json``: what it holds;
- ``shared/``: the merged model, a checkpoint like any other;
- ``expert-<task>.safetensors``: for each matrix ``<name>.left [M, R]`` and ``<name>.right [R, N]``, whose product is
  the difference; other tensors whole under their name. What does not differ is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import TORCH_NAMES, open_checkpoint
from hf_fuse.checkpoint.writer import Layout, PartialFolder, exclusive_output, lay_out
from hf_fuse.errors import CheckpointError, OutputError, RecipeError
from hf_fuse.merge.store import STORE_FILE, task_names
from hf_fuse.merge.twin_restore import FORMAT, KIND, SHARED
from hf_fuse.recipe import output_folder

if TYPE_CHECKING:
    from torch import Tensor

    from hf_fuse.merge.plan import Plan
    from hf_fuse.merge.sources import Buffers, FileSource
    from hf_fuse.merge.units import Unit
    from hf_fuse.recipe import Recipe

# The authors keep a tenth, and leave classifiers alone: they are the tasks' own.
DENSITY = [{"filter": "classifier", "value": 1.0}, {"filter": "score.", "value": 1.0}, {"value": 0.1}]


def compress_twin(
    recipe: str | Path | dict | Recipe,
    output: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    density: Any = None,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    workers: int | None = None,
) -> Path:
    """Merges fine-tunes as the recipe says, and keeps beside the result a low-rank difference for each of them.

    Args:
        recipe: any merge recipe without slices. The authors use task_arithmetic with lambda 0.3.
        output: the folder to make; else the recipe's.
        tasks: a name for each model; by default the last part of its path.
        density: share of the singular triplets that a matrix keeps, at least one; a number, or a list of filters and
            values as for a recipe's parameters. 1 keeps the difference whole. By default 0.1, and 1 for classifiers.
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
    from hf_fuse.merge.engine import merge
    from hf_fuse.merge.plan import plan
    from hf_fuse.recipe import load_recipe

    recipe = load_recipe(recipe, overrides)
    if recipe.slices:
        raise RecipeError("slices: a store restores whole models. List models instead.")
    options = {"overwrite": overwrite, "allow_pickle": allow_pickle}
    made = plan(recipe, output=output, verify=verify, **options)
    folder = output_folder(made.recipe.output)
    base = made.recipe.base_model.key if made.recipe.base_model else None
    models = [model for model in made.recipe.models if model.key != base]
    names = task_names(models, tasks)
    density = DENSITY if density is None else density
    with ExitStack() as stack:
        partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
        partial.folder.mkdir()
        within = made.recipe.model_copy(update={"push": None})
        shared = merge(within, partial.folder / SHARED, allow_pickle=allow_pickle, workers=workers)
        contents = _Contents.of(made, shared, names, density, workers)
        for task, layout in contents.layouts.items():
            if layout.headers:
                _write_expert(made, contents, task, partial, workers)
        partial.sync()
        _describe(made, contents, partial.folder)
        partial.publish()
    return folder


@dataclass
class _Contents:
    """For each task the tensors that differ from the shared model's, their ranks (0: kept whole) and places."""

    shared: FileSource
    tasks: dict[str, str]  # model key -> task
    ranks: dict[str, dict[str, int]]  # task -> tensor -> rank
    layouts: dict[str, Layout]
    density: Any

    @classmethod
    def of(cls, made: Plan, shared: Path, tasks: dict[str, str], density: Any, workers: int | None) -> _Contents:
        from hf_fuse.merge.sources import FileSource

        source = FileSource(open_checkpoint(str(shared)))
        changed = _changed(made, source, tasks, workers)
        ranks: dict[str, dict[str, int]] = {task: {} for task in tasks.values()}
        layouts = {}
        for key, task in tasks.items():
            rows = []
            for unit in made.units:
                if (unit.name, key) not in changed:
                    continue
                rank = ranks[task][unit.name] = kept_rank(unit.name, unit.shape, density)
                if rank:
                    rows.append((f"{unit.name}.left", unit.dtype, (unit.shape[0], rank)))
                    rows.append((f"{unit.name}.right", unit.dtype, (rank, unit.shape[1])))
                else:
                    rows.append((unit.name, unit.dtype, unit.shape))
            layouts[task] = lay_out(rows, 1 << 62, f"expert-{task}")
        return cls(source, tasks, ranks, layouts, density)


def kept_rank(name: str, shape: tuple[int, ...], density: Any) -> int:
    """Rank of a tensor's difference in the store; 0 if it is kept whole: no matrix, density 1, or no gain."""
    from hf_fuse.merge.parameters import resolve_value

    share = resolve_value(density, name, 0.0, "hf_fuse")
    share = 0.1 if share is None else share
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise RecipeError(f"density: {share!r} (tensor {name}), expected a number in (0, 1].")
    if len(shape) != 2 or share == 1:
        return 0
    # 0.1 * 10 may be a little less than 1 in floating point; a difference of rank 0 would lose the task.
    rank = max(1, int(share * min(shape) + 1e-9))
    return rank if rank * sum(shape) <= shape[0] * shape[1] else 0


def _difference(
    made: Plan, shared: FileSource, unit: Unit, key: str, start: int, stop: int, buffers: Buffers
) -> Tensor:
    """``theta_k - theta_s`` of elements ``[start, stop)``."""
    name = next(part.name for part in unit.inputs if part.key == key)
    block, base = buffers.numbers("block", stop - start), buffers.numbers("base", stop - start)
    made.parents[key].source.read(name, start, block, buffers)
    shared.read(unit.name, start, base, buffers)
    return block.sub_(base)


def _pool(made: Plan, workers: int | None) -> Any:
    import torch

    from hf_fuse.merge.workers import Workers

    return Workers(torch.device("cpu"), getattr(torch, made.recipe.dtype), workers)


def _changed(made: Plan, shared: FileSource, tasks: dict[str, str], workers: int | None) -> set[tuple[str, str]]:
    """``(tensor, model key)`` where the model differs from the shared one: frozen parts need no room."""
    from hf_fuse.merge.sources import BLOCK
    from hf_fuse.merge.units import COPY

    found: set[tuple[str, str]] = set()

    def look(job: tuple[Unit, str], buffers: Buffers, _: int) -> None:
        unit, key = job
        for start in range(0, unit.numel, BLOCK):
            if _difference(made, shared, unit, key, start, min(start + BLOCK, unit.numel), buffers).any():
                found.add((unit.name, key))
                return

    pool = _pool(made, workers)
    try:
        jobs = [
            (unit, part.key) for unit in made.units if unit.action != COPY for part in unit.inputs if part.key in tasks
        ]
        pool.run(jobs, look)
    finally:
        pool.close()
    return found


def _write_expert(made: Plan, contents: _Contents, task: str, partial: PartialFolder, workers: int | None) -> None:
    import torch

    from hf_fuse.merge.methods._spectral import thin_svd

    layout = contents.layouts[task]
    (file,) = layout.headers
    with (partial.folder / file).open("wb") as handle:
        handle.write(layout.headers[file])
        handle.truncate(layout.sizes[file])
    key = next(key for key, name in contents.tasks.items() if name == task)
    units = [unit for unit in made.units if unit.name in contents.ranks[task]]

    def put(name: str, values: Tensor) -> None:
        place = layout.places[name]
        cast = values.to(getattr(torch, TORCH_NAMES[place.dtype])).contiguous()
        if not cast.isfinite().all():
            raise OutputError(f"tensor {name} of {task}: not finite in {place.dtype}. Say a wider out_dtype.")
        partial.write(place, 0, memoryview(cast.view(-1).view(torch.uint8).numpy()))

    def work(unit: Unit, buffers: Buffers, _: int) -> None:
        rank = contents.ranks[task][unit.name]
        difference = _difference(made, contents.shared, unit, key, 0, unit.numel, buffers)
        if not rank:
            put(unit.name, difference)
            return
        if not difference.sum().isfinite():
            raise CheckpointError(f"{key}: tensor {unit.name} holds NaN or infinite values. Mend the model.")
        left, values, right = thin_svd(difference.view(unit.shape)).first(rank)
        put(f"{unit.name}.left", left * values)
        put(f"{unit.name}.right", right)

    pool = _pool(made, workers)
    try:
        pool.run(sorted(units, key=lambda unit: -unit.numel), work)
    finally:
        pool.close()


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
            "shared": SHARED,
            "method": made.method.name,
            "density": contents.density,
            "tasks": {
                task: {
                    "model": references[key].model_dump(include=fields, exclude_none=True),
                    "expert": next(iter(contents.layouts[task].headers), None) if contents.ranks[task] else None,
                }
                for key, task in contents.tasks.items()
            },
            "versions": versions(),
        },
    )
