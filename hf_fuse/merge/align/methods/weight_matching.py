"""Git Re-Basin's weight matching: the order of units in which two models' weights agree most. Needs no data.

One group of units after the other gets the best order given those of all others, until none improves. A visit reads one
group's tensors, a pair at a time.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.merge.align.alignment import Alignment, Matched
from hf_fuse.merge.align.maps import Maps, moved_units
from hf_fuse.merge.align.matching import gain, match
from hf_fuse.merge.align.pair import Pair
from hf_fuse.merge.align.spaces import Group
from hf_fuse.registry import Between

PAPER = "2209.04836"
# Sums in fp32 of equal products in another order differ by less.
GAIN = 1e-6


def needs_data(options: dict) -> bool:
    return False


def weight_matching(pair: Pair, *, residual: bool = True, sweeps: Annotated[int, Between(1)] = 100) -> Alignment:
    """Maximises the inner product of all weights of the two models.

    The first sweep starts at what has a fixed order (tokens, positions, pixels, classes) and goes inwards, so that it
    does not depend on how the units lie at first; later sweeps visit the groups in an order drawn with the seed. If
    that ends below the inner product of the models as they are, the sweeps start again from there.

    Args:
        residual: also the residual stream's units change places. Models with a common ancestor need not.
        sweeps: at most, over all groups.
    """
    groups = pair.movable(residual)
    found, done = _ascent(pair, groups, sweeps, anchored=True)
    before, after, whole = _agreement(pair, found)
    if whole[1] < whole[0]:
        found, more = _ascent(pair, groups, sweeps, anchored=False)
        done += more
        before, after, whole = _agreement(pair, found)
    rows = [
        Matched(
            group.name,
            pair.spaces[1].sizes[group.spaces[0]],
            moved_units(found, group.spaces),
            before[group.name],
            after[group.name],
        )
        for group in pair.groups
    ]
    facts = {"sweeps": done, "cosine_before": whole[0], "cosine_after": whole[1]}
    return Alignment(found, "cosine of weights", rows, facts=facts)


def _ascent(pair: Pair, groups: list[Group], sweeps: int, anchored: bool) -> tuple[dict[str, Tensor], int]:
    """-> the maps, and how many sweeps it took."""
    maps: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(pair.seed)
    settled = {space for group in pair.groups if group not in groups for space in group.spaces}
    for sweep in range(sweeps):
        first = anchored and sweep == 0
        order = range(len(groups)) if first else torch.randperm(len(groups), generator=random).tolist()
        improved = False
        for number in tqdm(order, desc=f"sweep {sweep + 1}", unit="group", disable=None, leave=False):
            group = groups[number]
            improved |= _visit(pair, group, maps, settled if first else None)
            settled |= {*group.spaces}
        if not improved and not first:
            return maps, sweep + 1
    return maps, sweeps


def _visit(pair: Pair, group: Group, maps: dict[str, Tensor], settled: set[str] | None) -> bool:
    """Gives one group its best order, if that is better than the one it has."""
    similarities, terms = pair.similarities(group, maps, settled)
    better = match(group, similarities, terms, pair.spaces)
    old, new = gain(similarities, maps), gain(similarities, better)
    scale = sum(matrix.abs().max(0).values.sum().item() for matrix in similarities.values())
    if new - old <= GAIN * scale:
        return False
    maps.update(better)
    return True


def _agreement(pair: Pair, maps: Maps) -> tuple[dict[str, float], dict[str, float], tuple[float, float]]:
    """Cosine of the two models' weights before and after, by group and of all."""
    owners: dict[str, set[str]] = {}
    for group in pair.groups:
        for space in group.spaces:
            for slot in pair.spaces[1].slots(space):
                owners.setdefault(slot.tensor, set()).add(group.name)
    sums = {group.name: torch.zeros(4, dtype=torch.float64) for group in pair.groups}
    whole = torch.zeros(4, dtype=torch.float64)
    for name, four in pair.agreement(maps):
        whole += four
        for owner in owners.get(name, ()):
            sums[owner] += four
    before = {name: _cosine(four[0], four) for name, four in sums.items()}
    after = {name: _cosine(four[1], four) for name, four in sums.items()}
    return before, after, (_cosine(whole[0], whole), _cosine(whole[1], whole))


def _cosine(product: Tensor, four: Tensor) -> float:
    length = math.sqrt(four[2].item() * four[3].item())
    return product.item() / length if length else 0.0
