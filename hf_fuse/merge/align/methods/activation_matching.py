"""Activation matching: units that do the same on data get the same place, by the correlation of their activations."""

from __future__ import annotations

from torch import Tensor

from hf_fuse.merge.align.alignment import Alignment, Matched
from hf_fuse.merge.align.maps import moved_units
from hf_fuse.merge.align.matching import gain, match
from hf_fuse.merge.align.pair import Pair

PAPER = "2209.04836"


def needs_data(options: dict) -> bool:
    return True


def activation_matching(pair: Pair, *, residual: bool = True) -> Alignment:
    """Maximises the correlation of matched units; every group by itself, as an order does not change what units do.

    Seen are what output projections read (neurons after the activation function, outputs of heads), queries, keys and
    values, and the residual stream in front of norms. Needs both models in memory, and the products of all units of a
    group.

    Args:
        residual: also the residual stream's units change places. Models with a common ancestor need not.
    """
    groups = pair.movable(residual)
    found: dict[str, Tensor] = {}
    rows = []
    for group, moments in pair.live.moments(groups):
        matrices = {space: one.correlation_mn for space, one in moments.items()}
        maps = match(group, matrices, dict.fromkeys(matrices, 1), pair.spaces)
        units = sum(pair.spaces[1].sizes[space] for space in group.spaces if space != group.heads)
        before, after = (gain(matrices, one) / units for one in ({}, maps))
        if after - before > 1e-6:
            found |= maps
        moved = moved_units(found, group.spaces)
        rows.append(Matched(group.name, pair.spaces[1].sizes[group.spaces[0]], moved, before, max(before, after)))
    return Alignment(found, "mean correlation of activations", rows)
