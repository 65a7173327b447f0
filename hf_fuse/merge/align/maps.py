"""Maps from the units of one model to those of another, and what they do to tensors.

A permutation is a list of indices ``[n]``: the unit at place j is the model's unit number ``map[j]``. A transport map
is a matrix ``[m, n]`` whose columns sum to one: unit j is a mean of the model's m units. Where units are read, the
weights of those m are spread over the n, so that nothing is lost: there the rows sum to one. A space without a map
stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import DTYPE_BYTES, TORCH_NAMES, FilePool, TensorInfo
from hf_fuse.merge.align.spaces import Axes, Part

Maps = Mapping[str, Tensor]  # by space
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def read_raw(info: TensorInfo, pool: FilePool) -> Tensor:
    """A whole tensor as integers of its element's size: values in any dtype can be put into another order as such."""
    values = torch.empty(info.shape, dtype=_INTEGERS[DTYPE_BYTES[info.dtype]])
    pool.read(info, 0, raw_bytes(values))
    return values


def read_fp32(info: TensorInfo, pool: FilePool) -> Tensor:
    return read_raw(info, pool).view(getattr(torch, TORCH_NAMES[info.dtype])).float()


def raw_bytes(values: Tensor) -> memoryview:
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())


def carried(values: Tensor, axes: Axes, maps: Maps, but: int | None = None) -> Tensor:
    """A tensor with the units of all its axes carried over, except on the axis ``but``."""
    for axis, parts in enumerate(axes):
        if axis != but and any(part.space in maps for part in parts):
            pieces = [_carried(values.narrow(axis, p.start, p.size), axis, maps.get(p.space), p.reads) for p in parts]
            values = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
    return values


def _carried(values: Tensor, axis: int, units: Tensor | None, reads: bool) -> Tensor:
    if units is None:
        return values
    if units.dim() == 1:
        return values.index_select(axis, units)
    if reads:
        units = units * (units.shape[0] / units.shape[1])
    return torch.tensordot(values, units, ([axis], [0])).movedim(-1, axis)


def rows(values: Tensor, axis: int, part: Part) -> Tensor:
    """What belongs to each unit of a part, as rows ``[n, X]``."""
    return values.narrow(axis, part.start, part.size).movedim(axis, 0).reshape(part.size, -1)


def inverse(units_n: Tensor) -> Tensor:
    """The permutation that takes one back."""
    return torch.empty_like(units_n).scatter_(0, units_n, torch.arange(len(units_n)))


def moved_units(maps: Maps, spaces: Iterable[str]) -> int:
    """How many units of a group change their place, in that of its spaces where most do; of a transport map, units
    whose largest part comes from another place."""
    found = [maps[space] for space in spaces if space in maps]
    orders = [units.argmax(0) if units.dim() == 2 else units for units in found]
    return max((int((units != torch.arange(len(units))).sum()) for units in orders), default=0)
