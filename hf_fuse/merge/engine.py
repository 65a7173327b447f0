"""From a plan to a folder: :func:`merge` on disk, :func:`merge_state_dicts` in memory, through the same stream.

Ranks share the tensors out among themselves, threads overlap reading, computing and writing, and the folder appears
when everything is on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fuse import registry
from hf_fuse.checkpoint.reader import DTYPE_BYTES, TORCH_NAMES
from hf_fuse.checkpoint.tied import Tying
from hf_fuse.checkpoint.writer import Layout, PartialFolder, exclusive_output
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.merge.plan import Plan, plan
from hf_fuse.merge.progress import Progress
from hf_fuse.merge.sources import BLOCK, MemorySource
from hf_fuse.merge.statistics import Statistics
from hf_fuse.merge.stream import Merger, Sink
from hf_fuse.merge.units import Unit, build_units
from hf_fuse.merge.workers import Workers, World, allow_open_files
from hf_fuse.recipe import Recipe, load_recipe, output_folder

# Elements computed at a time: small enough for a core's cache, large enough that threads seldom wait for the
# interpreter or a GPU for its next piece.
CHUNKS = {"cpu": BLOCK, "cuda": 32 * BLOCK}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FuseError(f"device: {name!r} is not a device. Expected cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FuseError(f"device: {name} is not available on this machine. Use cpu.")
    if device.type not in ("cpu", "cuda"):
        raise FuseError(f"device: merging runs on cpu or cuda, not on {device.type}.")
    return device


def merge(
    recipe: str | Path | dict | Recipe | Plan,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    allow_nonfinite: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    push: str | None = None,
    private: bool | None = None,
    workers: int | None = None,
    chunk_elements: int | None = None,
    continue_from: str | Path | None = None,
) -> Path:
    """Merges checkpoints as the recipe says, into a new folder.

    Args:
        recipe: YAML file, dictionary, Recipe, or a Plan made by :func:`hf_fuse.plan`.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"parameters.density": 0.3}``.
        overwrite: replace an existing output, in one step, when the new one is complete.
        device: ``cpu`` or ``cuda[:N]``; each block is computed there.
        allow_nonfinite: merge NaN and infinite values instead of refusing them.
        allow_pickle: accept ``.bin`` inputs.
        verify: compare Hub inputs with the Hub's hashes first.
        push: Hub id to push the result to (else the recipe's); token and access are checked before any work.
        private: make a new repository private.
        workers: threads; by default one per core, at most eight.
        chunk_elements: elements computed at a time, a multiple of 1024; by default what suits the device. Does not
            change the result.
        continue_from: output of an earlier merge by a sequential method (opcm), to which the recipe's models are added.
            Its other models are not needed any more. Write it in float32: what rounding takes from it stays lost.

    Returns:
        The output folder.

    Raises:
        FuseError: with one message that says what, where and what to do. No output is left then, an old one is intact.
    """
    place = _device(device)
    if isinstance(recipe, Plan):
        made = recipe
    else:
        options = {"overwrite": overwrite, "allow_pickle": allow_pickle, "verify": verify}
        made = plan(recipe, overrides=overrides, output=output, continue_from=continue_from, **options)
    folder = output_folder(made.recipe.output)
    target = _push_target(made, push, private)
    dtype = getattr(torch, made.recipe.dtype)
    if made.recipe.output_kind == "adapter":
        from hf_fuse.merge.adapters_to_adapter import write_adapter

        options = {"overwrite": overwrite, "allow_nonfinite": allow_nonfinite, "workers": workers}
        leads = write_adapter(made, folder, place, **options)
        return _pushed(folder, target if leads else None)
    with ExitStack() as stack:
        world = stack.enter_context(World())
        progress = stack.enter_context(Progress(made.bytes_read * made.passes // world.size, quiet=not world.leads))
        merger = Merger(
            made.method, {key: p.source for key, p in made.parents.items()}, made.units, dtype, made.recipe.seed,
            allow_nonfinite, chunk_elements or CHUNKS[place.type], progress, statistics=made.statistics,
        )  # fmt: skip
        opened = [*(parent.source for parent in made.parents.values()), *made.statistics.values()]
        files = {info.file for source in opened for info in source.tensors.values()}
        allow_open_files(len(files) + len(made.layout.sizes) + 64)
        pool = Workers(place, dtype, workers)
        stack.callback(pool.close)
        if world.leads:
            with world.together():
                partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
                partial.create(made.layout)
        else:
            with world.together():
                pass
            partial = PartialFolder(folder)
        merger.folder = partial.folder
        merger.run(_file_sink(partial, made.layout), world, pool)
        progress.phase("save")
        with world.together():
            partial.sync()
        with world.together():
            if world.leads:
                from hf_fuse.merge.finish import write_companions

                if merger.rescaling is not None:
                    made.record = merger.rescaling.record
                write_companions(made, partial.folder)
                partial.publish()
    return _pushed(folder, target if world.leads else None)


def _pushed(folder: Path, target: Any) -> Path:
    if target is not None:
        from hf_fuse.hub import push

        push(folder, target.repo_id, target=target)
    return folder


def _push_target(made: Plan, push: str | None, private: bool | None) -> Any:
    entry = made.recipe.push
    repo = push or (entry.repo if entry else None)
    if repo is None:
        return None
    from hf_fuse.hub import check_push

    private = private if private is not None or entry is None else entry.private
    return check_push(repo, private=private, revision=entry.revision if entry and not push else None)


def _file_sink(partial: PartialFolder, layout: Layout) -> Sink:
    def write(unit: Unit, start: int, out: Tensor) -> None:
        for name in (unit.name, *unit.aliases):
            partial.write(layout.places[name], start, memoryview(out.numpy()))

    return write


def merge_state_dicts(
    models: Sequence[Mapping[str, Tensor]],
    method: str = "linear",
    *,
    base: Mapping[str, Tensor] | None = None,
    parameters: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    post: str | Mapping[str, Any] | None = None,
    dtype: str = "float32",
    out_dtype: str | None = None,
    seed: int = 0,
    allow_nonfinite: bool = False,
    workers: int | None = None,
    chunk_elements: int = BLOCK,
) -> dict[str, Tensor]:
    """Merges state dicts in memory, by the same code and to the same bits as :func:`merge` on files.

    Tensors that are one piece of memory under several names in all of them (tied weights) are merged once.

    Args:
        models: K state dicts with equal names and shapes; not modified.
        base: the common base, for methods on task vectors.
        parameters: the method's parameters, as in a recipe (gradients and filters included).
        weights: K numbers, short for the parameter ``weight`` of each model.
        statistics: K sets of them for methods that use some (fisher, regmean), by tensor names.
        post: a step after the merge, or steps with their parameters, as in a recipe.

    Returns:
        A new state dict on the CPU.

    Raises:
        FuseError: names or shapes differ, a parameter is wrong, or a value is not finite.
    """
    if weights is not None and len(weights) != len(models):
        raise RecipeError(f"weights: {len(weights)} numbers for {len(models)} models.")
    if statistics is not None and len(statistics) != len(models):
        raise RecipeError(f"statistics: {len(statistics)} sets of them for {len(models)} models.")
    entries = [
        {"path": f"models[{k}]", **({} if weights is None else {"weight": weights[k]})} for k in range(len(models))
    ]
    recipe = load_recipe(
        {"method": method, "models": entries, "parameters": dict(parameters or {}), "dtype": dtype, "seed": seed}
        | ({"base_model": "base"} if base is not None else {})
        | ({"out_dtype": out_dtype} if out_dtype else {})
        | ({"post": post} if post else {})
    )
    found = registry.get("merge", recipe.method)
    states = {f"models[{k}]": state for k, state in enumerate(models)} | ({} if base is None else {"base": base})
    tied = _tied(list(states.values()))
    sources = {
        key: MemorySource({name: tensor for name, tensor in state.items() if name not in tied})
        for key, state in states.items()
    }
    beside = {
        f"models[{k}]": Statistics(f"statistics[{k}]", MemorySource(numbers))
        for k, numbers in enumerate(statistics or ())
    }
    units = build_units(recipe, found, {key: source.tensors for key, source in sources.items()}, Tying(), beside)
    result = {unit.name: torch.empty(unit.shape, dtype=getattr(torch, TORCH_NAMES[unit.dtype])) for unit in units}

    def keep(unit: Unit, start: int, out: Tensor) -> None:
        width = DTYPE_BYTES[unit.dtype]
        result[unit.name].view(-1).view(torch.uint8)[start * width : start * width + out.numel()] = out

    merger = Merger(
        found, sources, units, getattr(torch, dtype), seed, allow_nonfinite, chunk_elements, statistics=beside
    )
    pool = Workers(torch.device("cpu"), merger.dtype, workers)
    try:
        merger.run(keep, World(size=1, rank=0), pool)
    finally:
        pool.close()
    return result | {name: result[first] for name, first in tied.items() if first in result}


def _tied(states: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Names that are the same memory as an earlier name in every state dict -> the earlier name."""

    def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
        seen: dict[Any, str] = {}
        return {
            name: seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
            for name, tensor in state.items()
            if tensor.numel()
        }

    found = [first_names(state) for state in states]
    return {
        name: first
        for name, first in found[0].items()
        if first != name and all(other.get(name) == first for other in found)
    }
