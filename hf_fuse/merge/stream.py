"""The stream: a block of K models in, a block of the result out, in any order and on any thread.

read -> working precision -> finite? -> method -> one cast -> finite? -> sink. What a method has to measure first, over
a tensor or over the whole model, is measured here too.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fuse import registry
from hf_fuse.checkpoint.reader import DTYPE_BYTES, TORCH_NAMES
from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError
from hf_fuse.merge.learned_weights import expanded
from hf_fuse.merge.methods._passes import Pass, Place, Seen
from hf_fuse.merge.methods._random import TensorRandom
from hf_fuse.merge.progress import Progress
from hf_fuse.merge.rescale import Rescaling
from hf_fuse.merge.sources import BLOCK, Buffers
from hf_fuse.merge.units import COPY, MEAN, MERGE, Input, Unit
from hf_fuse.merge.workers import Workers, World, needs_whole_tensor, row_length
from hf_fuse.registry import Method

SPLIT_ABOVE = 16 * BLOCK  # an elementwise tensor is cut into jobs of this many elements

Sink = Callable[[Unit, int, Tensor], None]  # (unit, first element, uint8 bytes on the CPU)


def _place(unit: Unit, start: int) -> Place:
    """A stack of matrices counts as one, each below the one before."""
    shape = unit.shape if unit.matrix == unit.shape else (math.prod(unit.shape[:-1]), unit.shape[-1])
    return Place(unit.name, shape, start)


@dataclass
class Merger:
    """What a running merge needs to know: the method, the sources by key, and what has been measured."""

    method: Method
    sources: Mapping[str, Any]
    units: list[Unit]
    dtype: torch.dtype
    seed: int = 0
    allow_nonfinite: bool = False
    chunk: int = BLOCK
    progress: Progress = field(default_factory=Progress)
    states: dict[str, Any] = field(default_factory=dict)  # by unit name; "" for the whole model
    statistics: Mapping[str, Any] = field(default_factory=dict)  # hf_fuse.merge.statistics, by model key
    folder: Path | None = None  # where intermediate results may be kept; else the system's temporary folder

    def __post_init__(self) -> None:
        if self.chunk % 1024:
            raise FuseError(f"chunk_elements: {self.chunk} is not a multiple of 1024 elements.")
        self._arguments = set(inspect.signature(self.method.function).parameters)
        self._linear = registry.get("merge", "linear").function
        self._finite: set[str] = set()  # names of units that a whole pass has found so
        self.rescaling = Rescaling(self) if hasattr(self.method.module, "rescale") else None

    # -- one block ------------------------------------------------------------------------------------------------

    def block(self, unit: Unit, start: int, stop: int, buffers: Buffers) -> tuple[Tensor, Tensor | None]:
        """``[K, n]`` as the method wants it, and the base ``[n]`` if the result is a difference from it."""
        count, n = len(unit.inputs), stop - start
        block = buffers.numbers("block", count, n)
        base = None
        if unit.base is not None:
            base = buffers.numbers("base", n)
            base_source = self.sources[unit.base.key]
            base_source.read(unit.base.name, start, base, buffers)
            if unit.name not in self._finite:
                self._check(base, unit, unit.base)
        for k, part in enumerate(unit.inputs):
            source = self.sources[part.key]
            if base is not None and part.name == unit.base.name and source.delta_from(base_source, part.name):
                source.read_delta(part.name, start, block[k], buffers)
            else:
                source.read(part.name, start, block[k], buffers)
                if base is not None:
                    block[k].sub_(base)
        parts = unit.inputs if unit.base is None else [*unit.inputs, unit.base]
        self.progress.add(n * sum(DTYPE_BYTES[self.sources[part.key].tensors[part.name].dtype] for part in parts))
        # A sum is finite only if everything in it is: one cheap look at the block, a closer one only on alarm.
        if not self.allow_nonfinite and unit.name not in self._finite and not block.sum().isfinite():
            for k, part in enumerate(unit.inputs):
                self._check(block[k], unit, part)
        return block, base

    def statistics_block(self, unit: Unit, start: int, stop: int, buffers: Buffers) -> Tensor | None:
        """The models' statistics: ``[K, n]`` beside the block of weights, or ``[K, in, in]`` for a whole matrix; None
        if this tensor has none."""
        if not unit.statistics:
            return None
        infos = [self.statistics[part.key].tensors[part.name] for part in unit.statistics]
        shape = (stop - start,)
        if "input_axis" in unit.options:
            start, shape = 0, infos[0].shape
        block = buffers.numbers("statistics", len(infos), *shape)
        for k, part in enumerate(unit.statistics):
            self.statistics[part.key].source.read(part.name, start, block[k].view(-1), buffers)
            self.progress.add(block[k].numel() * DTYPE_BYTES[infos[k].dtype])
            self._check(block[k], unit, Input(f"statistics {self.statistics[part.key].ref}", part.name))
        return block

    def _check(self, values: Tensor, unit: Unit, part: Input | None) -> None:
        if self.allow_nonfinite or values.sum().isfinite():
            return
        bad = int(values.numel() - values.isfinite().sum())
        if not bad:
            return  # finite numbers whose sum overflows
        if part is None:
            raise OutputError(
                f"tensor {unit.name}: the merge makes at least {bad} value(s) that are not finite in {unit.dtype}. "
                "Choose smaller weights or a wider out_dtype, or pass --allow-nonfinite."
            )
        raise CheckpointError(
            f"{part.key}: tensor {part.name} holds at least {bad} NaN or infinite value(s). Mend the model, or pass "
            "--allow-nonfinite to merge it all the same."
        )

    @staticmethod
    def blocks(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def _step(self, unit: Unit, wanted: int) -> int:
        """Elements handed over at a time: ``wanted``, or as many whole rows as fit into it, or a whole matrix."""
        if needs_whole_tensor(self.method, unit):
            return max(math.prod(unit.matrix), 1)
        row = row_length(self.method, unit)
        return wanted if row is None else max(wanted // row, 1) * row

    def _shaped(self, unit: Unit, block: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A block and its base as the method wants them."""
        row = row_length(self.method, unit)
        if row is not None:
            shape = (-1, row)
        elif needs_whole_tensor(self.method, unit):
            shape = unit.matrix
        else:
            return block, base
        return block.view(block.shape[0], *shape), None if base is None else base.view(shape)

    # -- measuring ------------------------------------------------------------------------------------------------

    def scope(self, unit: Unit) -> str | None:
        """What has to be measured before this unit: its own tensor, the whole model, or nothing."""
        if unit.action != MERGE or not hasattr(self.method.module, "measure"):
            return None
        if needs_whole_tensor(self.method, unit):
            return None
        return unit.options.get("scope") or getattr(self.method.module, "MEASURE_SCOPE", "model")

    def _measurement(self, unit: Unit, numel: int) -> Generator[Pass, Tensor, Any]:
        measure = self.method.module.measure
        known = unit.options | {"place": _place(unit, 0)}
        wanted = list(inspect.signature(measure).parameters)[3:]
        return measure(len(unit.inputs), numel, self.dtype, **{name: known[name] for name in wanted})

    def measure_tensor(self, unit: Unit, buffers: Buffers) -> Any:
        """Runs a tensor's own measurement in the calling thread."""
        steps, total = self._measurement(unit, unit.numel), None
        while True:
            try:
                wanted = steps.send(total)
            except StopIteration as done:
                return done.value
            total = self._add_blocks(wanted, unit, 0, unit.numel, wanted.total.clone(), buffers)
            if wanted.sees_all_weights:
                self._finite.add(unit.name)

    def _add_blocks(self, wanted: Pass, unit: Unit, first: int, last: int, total: Tensor, buffers: Buffers) -> Tensor:
        step = self._step(unit, BLOCK)
        # A sample is the first part of every other block: tensors differ more than the parts of one, so each should be
        # in it, but very small pieces cost more than they say. The tensor's name shifts the choice, so that small
        # tensors are not all in or all out.
        every = min(wanted.share, 2)
        part = self._step(unit, BLOCK // (wanted.share // every))
        shift = zlib.crc32(unit.name.encode())
        for start, stop in self.blocks(first, last, step):
            if wanted.share > 1:
                if (start // step + shift) % every:
                    continue
                stop = min(stop, start + part)
            if wanted.of == "statistics":
                block, base = self.statistics_block(unit, start, stop, buffers), None
            else:
                block, base = self._shaped(unit, *self.block(unit, start, stop, buffers))
            random = TensorRandom(self.seed, unit.name, start)
            wanted.add(block, total, Seen(unit.options, random, _place(unit, start), base))
        return total

    def measure_model(self, units: list[Unit], world: World, workers: Workers) -> None:
        """Runs a measurement over all units of all ranks and keeps its result as the state of each."""
        if not units:
            return
        self._check_uniform(units)
        mine = world.share(units, lambda unit: unit.numel)
        order = {unit.name: number for number, unit in enumerate(units)}
        steps, total = self._measurement(units[0], sum(unit.numel for unit in units)), None
        while True:
            try:
                wanted = steps.send(total)
            except StopIteration as done:
                self.states[""] = done.value
                return
            self.progress.phase("measure")
            exact = not wanted.total.is_floating_point()
            totals: dict[Any, Tensor] = {}

            def work(
                job: tuple[Unit, int, int], buffers: Buffers, number: int, wanted=wanted, totals=totals, exact=exact
            ):
                unit, first, last = job
                # Integers may be added in any order; floating sums are kept apart and added in a fixed one.
                key = number if exact else (order[unit.name], first)
                if key not in totals:
                    totals[key] = wanted.total.clone()
                self._add_blocks(wanted, unit, first, last, totals[key], buffers)

            with world.together():
                workers.run(self.jobs(mine), work)
            if wanted.sees_all_weights:
                self._finite.update(unit.name for unit in mine)
            merged: dict[Any, Tensor] = {}
            for rank, part in enumerate(world.gather(totals)):
                merged |= {((rank, key) if exact else key): value for key, value in part.items()}
            total = wanted.total.clone()
            for key in sorted(merged):
                total += merged[key]

    def _check_uniform(self, units: list[Unit]) -> None:
        wanted = list(inspect.signature(self.method.module.measure).parameters)[3:]
        for name in wanted:
            for unit in units:
                if unit.options[name] != units[0].options[name] or len(unit.inputs) != len(units[0].inputs):
                    hint = " Say scope: tensor, or give one value." if "scope" in unit.options else ""
                    raise RecipeError(
                        f"parameters: {name} differs between tensors ({units[0].name} and {unit.name}), but "
                        f"{self.method.name} measures the whole model with it.{hint}"
                    )

    # -- merging --------------------------------------------------------------------------------------------------

    def jobs(self, units: list[Unit]) -> list[tuple[Unit, int, int]]:
        """Pieces of work, large first: whole tensors, or cuts of those that may be cut."""
        found = []
        for unit in units:
            whole = self.scope(unit) == "tensor" or needs_whole_tensor(self.method, unit) or unit.post
            step = max(unit.numel, 1) if whole else self._step(unit, SPLIT_ABOVE)
            found += [(unit, start, min(start + step, unit.numel)) for start in range(0, max(unit.numel, 1), step)]
        return sorted(found, key=lambda job: job[1] - job[2])

    def merge(self, unit: Unit, first: int, last: int, sink: Sink, buffers: Buffers) -> None:
        """Computes elements ``[first, last)`` of one output tensor and hands the bytes to ``sink``."""
        if unit.action == COPY:
            self._copy(unit, first, last, sink, buffers)
            return
        for start, merged, base in self.computed(unit, first, last, buffers):
            if base is not None:
                merged.add_(base)
            self._emit(unit, start, merged, sink, buffers)

    def computed(
        self, unit: Unit, first: int, last: int, buffers: Buffers
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """``(first element, merged block, base)``: what becomes of ``[first, last)``, and the base to add."""
        if self.rescaling is not None and unit.action == MERGE:
            parts = self.rescaling.pieces(unit, first, last, buffers)
        else:
            parts = ((start, merged, base) for start, _, merged, base in self.pieces(unit, first, last, buffers))
        yield from self._after(unit, parts, buffers) if unit.post else parts

    def _after(
        self, unit: Unit, parts: Iterator[tuple[int, Tensor, Tensor | None]], buffers: Buffers
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The whole merged tensor, gathered and put through the recipe's post steps."""
        whole, bases = (buffers.numbers(slot, unit.numel) for slot in ("merged", "bases"))
        for start, merged, base in parts:
            whole[start : start + len(merged)] = merged
            bases[start : start + len(merged)] = base
        for matrix in whole.view(-1, *unit.matrix):
            result = matrix
            for step in unit.post:
                result = step(result)
            matrix.copy_(result)
        yield 0, whole, bases

    def pieces(
        self, unit: Unit, first: int, last: int, buffers: Buffers, chunk: int | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """``(first element, input block, what the method makes of it, base)`` of ``[first, last)``."""
        options = dict(unit.options)
        scope = self.scope(unit)
        if "state" in self._arguments and unit.action == MERGE:
            options["state"] = self.measure_tensor(unit, buffers) if scope == "tensor" else self.states.get("")
        for start, stop in self.blocks(first, last, self._step(unit, chunk or self.chunk)):
            block, base = self.block(unit, start, stop, buffers)
            if unit.action == MEAN:
                weight = unit.options["weight"]
                merged = self._linear(block, weight=weight if sum(weight) else [1.0] * len(weight))
            else:
                if "random" in self._arguments:
                    options["random"] = TensorRandom(self.seed, unit.name, start)
                if "statistics" in self._arguments:
                    options["statistics"] = self.statistics_block(unit, start, stop, buffers)
                if "place" in self._arguments:
                    options["place"] = _place(unit, start)
                if unit.chunked:
                    weight = unit.options["weight"]
                    options["weight"] = expanded(weight, unit.name, unit.numel, start, stop, block)
                shaped, shaped_base = self._shaped(unit, block, base)
                if "base" in self._arguments:
                    options["base"] = shaped_base
                merged = self.method.function(shaped, **options).reshape(-1)
            yield start, block, merged, base

    def _emit(self, unit: Unit, start: int, merged: Tensor, sink: Sink, buffers: Buffers) -> None:
        dtype = getattr(torch, TORCH_NAMES[unit.dtype])
        out = buffers.bytes(merged.numel() * DTYPE_BYTES[unit.dtype], "out")
        cast = out.view(dtype)
        cast.copy_(merged)
        self._check(cast, unit, None)  # after the cast: what is finite before may round to infinity
        sink(unit, start, out)

    def _copy(self, unit: Unit, first: int, last: int, sink: Sink, buffers: Buffers) -> None:
        part = unit.inputs[0]
        for start, stop in self.blocks(first, last, self.chunk):
            out = buffers.bytes((stop - start) * DTYPE_BYTES[unit.dtype], "out")
            self.sources[part.key].raw(part.name, start, out, buffers)
            self.progress.add(out.numel())
            sink(unit, start, out)

    def run(self, sink: Sink, world: World, workers: Workers) -> None:
        mine = self.prepare(world, workers)
        with world.together():
            workers.run(self.jobs(mine), lambda job, buffers, _: self.merge(*job, sink, buffers))
        self.close()

    def prepare(self, world: World, workers: Workers) -> list[Unit]:
        """All that must be known of the whole model before the first block is final. Returns this rank's units."""
        self.measure_model([unit for unit in self.units if self.scope(unit) == "model"], world, workers)
        mine = world.share(self.units, lambda unit: unit.numel)
        if self.rescaling is not None:
            self.progress.phase("compute")
            self.rescaling.hold(mine, world, workers)
        self.progress.phase("merge")
        return mine

    def close(self) -> None:
        if self.rescaling is not None:
            self.rescaling.close()
