"""Fusion by optimal transport: units of one model are carried to those of the other, which may have other widths, and
the two are averaged.

With ``solver: exact`` and equal widths the map is a permutation, as in weight or activation matching, but found in one
walk through the layers; with Sinkhorn every unit becomes a mean of several, weighted by how near they are.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.errors import CheckpointError
from hf_fuse.merge.align.alignment import Alignment, Fused, Matched
from hf_fuse.merge.align.maps import carried, moved_units, read_fp32
from hf_fuse.merge.align.matching import match
from hf_fuse.merge.align.pair import Pair, same_ends
from hf_fuse.merge.align.transport import distance, transport_map
from hf_fuse.registry import Between

PAPER = "2310.05719"
SAME_WIDTHS = False
FUSES = True
REGULARIZATION = {"weights": 0.06, "activations": 0.08}


def needs_data(options: dict) -> bool:
    return options["metric"] == "activations"


def check(pair: Pair, *, residual: bool, **_: object) -> None:
    """Raises CheckpointError if the models can't be carried over to each other."""
    same_ends(pair)
    one, other = pair.spaces
    if not residual and one.sizes["residual"] != other.sizes["residual"]:
        raise CheckpointError("parameters: residual is false, but the models' residual streams have different widths.")
    for block, heads in one.heads.items():
        if one.family.rotary and heads.size != other.heads[block].size:
            raise CheckpointError(
                f"{pair.moved.ref} has heads of {heads.size} units, {pair.reference.ref} of {other.heads[block].size}. "
                "Rotary positions turn each unit at a speed of its own, so heads must be equally large."
            )


def optimal_transport(
    pair: Pair,
    *,
    metric: Literal["weights", "activations"] = "weights",
    solver: Literal["sinkhorn", "exact"] = "sinkhorn",
    regularization: Annotated[float | None, Between(0, open_low=True)] = None,
    share: Annotated[float, Between(0, 1)] = 0.5,
    residual: bool = True,
) -> Alignment:
    """Writes the mean of the reference and the carried model, in the reference's shapes.

    Costs are Euclidean distances of units as unit vectors (of weights, the inputs carried over before; or of
    standardised activations), divided by the largest. Unlike in the authors' code, which lets units cross heads, there
    is a plan of whole groups of heads and plans inside of each pair of them, so that attention stays what it is; the
    residual stream has one map; and where units are read, a map spreads their weights (its rows sum to one), which is
    the same for equal widths and loses nothing where units are merged.

    Args:
        metric: what units are compared by; activations need data.
        solver: Sinkhorn, or the exact plan, which for equal widths is a permutation.
        regularization: of Sinkhorn: the larger, the more units are mixed. None: the authors' 0.06 for weights and 0.08
            for activations.
        share: of the reference in the mean.
        residual: also the residual stream is carried over. Models with a common ancestor need not.
    """
    groups = pair.movable(residual)
    strength = (regularization or REGULARIZATION[metric]) if solver == "sinkhorn" else None
    maps: dict[str, Tensor] = {}
    settled = set() if residual else {"residual"}
    rows = []

    def solve(similarity: Tensor, terms: int) -> Tensor:
        return transport_map(distance(similarity, terms), strength)

    def matrices():
        if metric == "activations":
            for group, moments in pair.live.moments(groups):
                yield group, {space: one.correlation_mn for space, one in moments.items()}, None
        else:
            for group in tqdm(groups, desc="transport", unit="group", disable=None):
                yield group, *pair.similarities(group, maps, settled, cosine=True)

    for group, similarities, terms in matrices():
        terms = terms or dict.fromkeys(similarities, 1)
        found = match(group, similarities, terms, pair.spaces, solve)
        costs = {space: distance(matrix, terms[space]) for space, matrix in similarities.items()}
        after = [(costs[space] * units).sum(0).mean().item() for space, units in found.items()]
        before = [
            (cost.diagonal() if cost.shape[0] == cost.shape[1] else cost).mean().item() for cost in costs.values()
        ]
        if solver == "exact" and all(units.shape[0] == units.shape[1] for units in found.values()):
            found = {space: units.argmax(0) for space, units in found.items()}
        maps |= found
        settled |= {*group.spaces}
        moved = moved_units(found, group.spaces)
        size = pair.spaces[1].sizes[group.spaces[0]]
        rows.append(Matched(group.name, size, moved, sum(before) / len(before), sum(after) / len(after)))

    def make(name: str) -> Tensor:
        ours = carried(read_fp32(pair.moved.tensors[name], pair.pool), pair.spaces[0].axes[name], maps)
        return torch.lerp(ours, read_fp32(pair.reference.tensors[name], pair.pool), share)

    permuted = all(units.dim() == 1 for units in maps.values())
    difference = pair.same_function(maps) if permuted else None
    return Alignment(maps, "mean distance", rows, Fused(make), difference)
