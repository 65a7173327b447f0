"""Methods whose merged difference gets its length at the very end, when the whole of it is known.

Their modules have ``rescale(lengths, merged_length, **options) -> (factor, record)``: Euclidean lengths over the whole
model of each task vector and of the merged one. Everything is computed once and laid on a :class:`Shelf`, then
multiplied on its way out. ``record`` is what a later merge needs to go on from this one.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fuse.errors import OutputError, RecipeError
from hf_fuse.merge.sources import BLOCK, Buffers
from hf_fuse.merge.units import MERGE, Unit

if TYPE_CHECKING:
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.workers import Workers, World


class Shelf:
    """Merged differences in the working precision, in a file without a name: it is gone when the process is."""

    def __init__(self, folder: Path | None, units: list[Unit], dtype: torch.dtype):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as the shelf
        self._dtype, self._starts, end = dtype, {}, 0
        for unit in units:
            self._starts[unit.name] = end
            end += unit.numel * dtype.itemsize

    def put(self, unit: Unit, start: int, values: Tensor) -> None:
        _transfer(self._file.fileno(), self._place(unit, start), values.cpu().contiguous(), write=True)

    def take(self, unit: Unit, start: int, out: Tensor) -> None:
        held = torch.empty(out.shape, dtype=self._dtype)
        _transfer(self._file.fileno(), self._place(unit, start), held, write=False)
        out.copy_(held)

    def _place(self, unit: Unit, start: int) -> int:
        return self._starts[unit.name] + start * self._dtype.itemsize

    def close(self) -> None:
        self._file.close()


def _transfer(handle: int, offset: int, values: Tensor, *, write: bool) -> None:
    view, done = memoryview(values.numpy()).cast("B"), 0
    try:
        while done < len(view):
            if write:
                done += os.pwrite(handle, view[done:], offset + done)
            else:
                done += os.preadv(handle, [view[done:]], offset + done)
    except OSError as error:
        raise OutputError(
            f"intermediate results cannot be kept on the output's disk ({error.strerror}). This method needs room for "
            "one copy of the model in the working precision there, besides the output."
        ) from None


class Rescaling:
    """The two halves: :meth:`hold` computes and measures, :meth:`pieces` hands out the rescaled differences."""

    def __init__(self, merger: Merger):
        self.merger = merger
        self.factor: float = 1.0
        self.record: dict[str, Any] = {}
        self.shelf: Shelf | None = None

    def hold(self, units: list[Unit], world: World, workers: Workers) -> None:
        """Computes all units that this rank shares in, and the factor, which is the same on all ranks.

        Args:
            units: this rank's, of all actions.
        """
        merger = self.merger
        merged = [unit for unit in units if unit.action == MERGE]
        order = {unit.name: number for number, unit in enumerate(merger.units)}
        count = max((len(unit.inputs) for unit in merger.units if unit.action == MERGE), default=1)
        self.shelf = Shelf(merger.folder, merged, merger.dtype)
        squares: dict[tuple[int, int], Tensor] = {}

        def work(job: tuple[Unit, int, int], buffers: Buffers, number: int) -> None:
            unit, first, last = job
            total = torch.zeros(count + 1, dtype=torch.float64)
            # Fixed blocks: the sums, and so the factor, must not depend on how much is computed at a time.
            for start, block, difference, _ in merger.pieces(unit, first, last, buffers, BLOCK):
                for k in range(len(block)):
                    total[k] += _square(block[k])
                total[count] += _square(difference)
                self.shelf.put(unit, start, difference)
            squares[order[unit.name], first] = total

        with world.together():
            workers.run(merger.jobs(merged), work)
        everybody: dict[tuple[int, int], Tensor] = {}
        for part in world.gather(squares):
            everybody |= part
        total = torch.zeros(count + 1, dtype=torch.float64)
        for key in sorted(everybody):
            total += everybody[key]
        lengths = total.sqrt().tolist()
        self.factor, self.record = merger.method.module.rescale(lengths[:-1], lengths[-1], **self._options())

    def _options(self) -> dict[str, Any]:
        wanted = list(inspect.signature(self.merger.method.module.rescale).parameters)[2:]
        units = [unit for unit in self.merger.units if unit.action == MERGE]
        found: dict[str, Any] = {}
        for unit in units:
            for name in wanted:
                if found.setdefault(name, unit.options[name]) != unit.options[name]:
                    raise RecipeError(
                        f"parameters: {name} differs between tensors ({units[0].name} and {unit.name}), but "
                        f"{self.merger.method.name} scales the whole model with it. Give one value."
                    )
        return found or {name: self.merger.method.options[name].default for name in wanted}

    def pieces(
        self, unit: Unit, first: int, last: int, buffers: Buffers
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """``(first element, rescaled difference, base)`` of elements ``[first, last)``."""
        if self.shelf is None:
            raise RecipeError(f"{self.merger.method.name}: its result has no length yet, so it can't be used here.")
        for start, stop in self.merger.blocks(first, last, self.merger.chunk):
            difference = buffers.numbers("block", stop - start)
            self.shelf.take(unit, start, difference)
            base = buffers.numbers("base", stop - start)
            self.merger.sources[unit.base.key].read(unit.base.name, start, base, buffers)
            yield start, difference.mul_(self.factor), base

    def close(self) -> None:
        if self.shelf is not None:
            self.shelf.close()


def _square(values: Tensor) -> float:
    values = values.double()
    return float(torch.dot(values, values))
