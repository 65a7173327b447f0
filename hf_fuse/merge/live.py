"""Where the tensors of a checkpoint lie in the live model: names, and sometimes shapes and orders, differ."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fuse.errors import CheckpointError


@dataclass(frozen=True)
class Region:
    """One stored tensor inside a parameter (or buffer) of the live model.

    Attributes:
        first: the stored tensor's first element in the flattened parameter, if its elements follow each other there.
        index_N: else the place of every element.
    """

    parameter: Tensor
    numel: int
    first: int = 0
    index_N: Tensor | None = None

    def write(self, start: int, values_N: Tensor) -> None:
        """Elements of the stored tensor from ``start`` on, in the parameter's own precision afterwards."""
        flat = self.parameter.data.view(-1)
        if self.index_N is None:
            flat[self.first + start : self.first + start + len(values_N)] = values_N.to(flat.device, flat.dtype)
        else:
            flat[self.index_N[start : start + len(values_N)].long()] = values_N.to(flat.device, flat.dtype)

    def read(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of the stored tensor, out of something shaped as the parameter."""
        flat = gradient.reshape(-1)
        if self.index_N is None:
            return flat[self.first + start : self.first + stop]
        return flat[self.index_N[start:stop].long()]


def regions(model: Any, shapes: dict[str, tuple[int, ...]], besides: Collection[str] = ()) -> dict[str, Region]:
    """Where each stored tensor lies; those that the model does not use are left out.

    A weight that is tied to another is one parameter: it goes by whichever of its names is stored. Layouts in which a
    stored tensor is part of a parameter (stacked experts) or turned over are followed.

    Args:
        model: loaded by transformers, whose record of what loading changed is used.
        shapes: stored name -> shape.
        besides: stored names that do not matter, such as those of a head.

    Raises:
        CheckpointError: a parameter that no stored tensor fills; a stored tensor that fills several parameters.
    """
    found: dict[str, Region] = {}
    for tensor, names in _tensors(model):
        filled, known = 0, False
        for name in names:
            for stored, region in _stored(model, name, tensor):
                known |= stored in besides
                if stored in shapes and stored not in found and region.numel == math.prod(shapes[stored]):
                    found[stored] = region
                    filled += region.numel
            if filled or known:
                break
        if isinstance(tensor, torch.nn.Parameter) and filled != tensor.numel() and not known:
            raise CheckpointError(
                f"{type(model).__name__}: no stored tensor fills its parameter {names[0]}, so it can't be merged in a "
                "live model. The files may be of an older layout: save them again with save_pretrained."
            )
    return found


def _tensors(model: Any) -> Iterator[tuple[Tensor, list[str]]]:
    """All parameters and floating-point buffers with their names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if tensor.is_floating_point():
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield tensor, names[key]


def _stored(model: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Region]]:
    """Stored names of a parameter, found out by sending the numbers of its elements the way that saving goes."""
    from transformers.core_model_loading import revert_weight_conversion

    probe = torch.empty(tensor.shape, device="meta")
    if (same := revert_weight_conversion(model, {name: probe})) and next(iter(same.values())) is probe:
        yield next(iter(same)), Region(tensor, tensor.numel())
        return
    kind = torch.int32 if tensor.numel() < 1 << 31 else torch.int64
    places = torch.arange(tensor.numel(), dtype=kind).view(tensor.shape)
    for stored, index in revert_weight_conversion(model, {name: places}).items():
        index_N = index.reshape(-1)
        first = int(index_N[0]) if len(index_N) else 0
        if torch.equal(index_N, torch.arange(first, first + len(index_N), dtype=kind)):
            yield stored, Region(tensor, len(index_N), first)
        else:
            yield stored, Region(tensor, len(index_N), 0, index_N.to(tensor.device))
