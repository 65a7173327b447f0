"""Partial merging of two aligned models: some units become one, the others are kept side by side.

Of a split set of n units, k of them apart, the merged model has n + k: those merged, then the first model's own, then
the second's. What is merged makes and reads means; own units are made as in their model, and half of what reads them
counts, since the other model's half stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fuse.merge.align.spaces import Axes, Part


@dataclass(frozen=True)
class Split:
    """Which units of a space are merged, and which are kept apart: indices, the same in both models."""

    merged: Tensor
    apart: Tensor

    @property
    def size(self) -> int:
        return len(self.merged) + 2 * len(self.apart)


Splits = Mapping[str, Split]  # by space; of a space without one all units are merged


def split(score_n: Tensor, count: int) -> Split:
    """Keeps the ``count`` units with the lowest score apart, in their order."""
    apart = score_n.argsort(stable=True)[:count].sort().values
    kept = torch.ones(len(score_n), dtype=torch.bool)
    kept[apart] = False
    return Split(kept.nonzero()[:, 0], apart)


def side_by_side(one: Tensor, other: Tensor, axis: int, parts: tuple[Part, ...], splits: Splits) -> Tensor:
    """Activations of two models, or what makes them, along an axis: [means | the one's own | the other's own]."""
    if not any(part.space in splits for part in parts):
        return (one + other) / 2
    pieces = []
    for part in parts:
        a, b = (values.narrow(axis, part.start, part.size) for values in (one, other))
        found = splits.get(part.space)
        if found is None:
            pieces.append((a + b) / 2)
        else:
            merged, apart = found.merged.to(a.device), found.apart.to(a.device)
            own = [values.index_select(axis, apart) / (2 if part.reads else 1) for values in (a, b)]
            pieces += [(a.index_select(axis, merged) + b.index_select(axis, merged)) / 2, *own]
    return torch.cat(pieces, axis)


def partial_merge(one: Tensor, other: Tensor, axes: Axes, splits: Splits) -> Tensor:
    """A tensor of the merged model. At most one of its axes is split: the residual stream never is."""
    split_axes = [axis for axis, parts in enumerate(axes) if any(part.space in splits for part in parts)]
    axis = split_axes[0] if split_axes else 0
    return side_by_side(one, other, axis, axes[axis] if axes else (), splits)


def merged_shape(shape: tuple[int, ...], axes: Axes, splits: Splits) -> tuple[int, ...]:
    return tuple(
        sum(splits[part.space].size if part.space in splits else part.size for part in parts) if parts else length
        for length, parts in zip(shape, axes)
    )
