"""From similarities of units to maps: one assignment for a plain group, three that depend on each other in attention.

Letters of shapes: m, n units of the model that moves and of the reference; A, B their groups of heads, R, S heads of a
group, I, J dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_fuse.merge.align.spaces import BOUND, Group, Heads, Spaces

# Similarities [.., m, n] that are sums of so many terms -> maps [.., m, n] whose columns sum to one.
Solve = Callable[[Tensor, int], Tensor]
ROUNDS = 10  # of heads and dimensions in turn; they settle in two or three


def assign(similarity_mn: Tensor) -> Tensor:
    """The permutation ``[n]`` with the largest sum of similarities."""
    return torch.from_numpy(linear_sum_assignment(similarity_mn.T.numpy(), maximize=True)[1])


def assign_maps(similarity: Tensor, terms: int = 1) -> Tensor:
    """:func:`assign` as a :data:`Solve`: maps of zeros and ones."""
    flat = similarity.reshape(-1, *similarity.shape[-2:])
    made = torch.zeros_like(flat)
    for matrix_mn, map_mn in zip(flat, made):
        map_mn[assign(matrix_mn), torch.arange(matrix_mn.shape[1])] = 1
    return made.view_as(similarity)


def match(
    group: Group,
    similarities: Mapping[str, Tensor],
    terms: Mapping[str, int],
    spaces: tuple[Spaces, Spaces],
    solve: Solve = assign_maps,
) -> dict[str, Tensor]:
    """Maps of all spaces of a group.

    Args:
        group: what is bound together.
        similarities: ``[m, n]`` of each space's units.
        terms: of how many terms each of them is the sum.
        spaces: of the model that moves and of the reference.
        solve: permutations by default; maps of zeros and ones come back as lists of indices.
    """
    if not group.blocks:
        (space,) = group.spaces
        if solve is assign_maps:
            return {space: assign(similarities[space])}
        return {space: solve(similarities[space], terms[space])}
    inner = {}
    gain_AB: Tensor | int = 0
    count = 0
    for block in group.blocks:
        found = [similarities[block + word] for word in BOUND]
        scale = {word: terms[block + word] for word in BOUND}
        heads = (spaces[0].heads[block], spaces[1].heads[block])
        inner[block] = _inside(found, scale, heads, spaces[0].family.rotary, solve)
        gain_AB = gain_AB + inner[block].gain_AB
        count += inner[block].terms
    if group.heads:
        gain_AB = gain_AB + similarities[group.heads]
        count += terms[group.heads]
    outer_AB = solve(gain_AB, count)
    maps = {}
    for block, one in inner.items():
        maps |= {block + word: _indices(matrix, solve) for word, matrix in one.whole(outer_AB).items()}
    if group.heads:
        maps[group.heads] = _indices(outer_AB, solve)
    return maps


def _indices(map_mn: Tensor, solve: Solve) -> Tensor:
    return map_mn.argmax(0) if solve is assign_maps else map_mn


@dataclass(frozen=True)
class _Inside:
    """Best maps inside of every pair of groups of heads, and what each pair is worth with them."""

    heads_ABRS: Tensor
    values_ABIJ: Tensor
    keys_ABIJ: Tensor
    gain_AB: Tensor
    terms: int

    def whole(self, outer_AB: Tensor) -> dict[str, Tensor]:
        """Maps of the four spaces from one of the groups."""

        def flat(letters: str, *parts: Tensor) -> Tensor:
            made = torch.einsum(letters, outer_AB, *parts)
            half = made.dim() // 2
            return made.flatten(half).flatten(0, half - 1)

        return {
            "query": flat("ab,abrs,abij->aribsj", self.heads_ABRS, self.keys_ABIJ),
            "key": flat("ab,abij->aibj", self.keys_ABIJ),
            "value": flat("ab,abij->aibj", self.values_ABIJ),
            "mixed": flat("ab,abrs,abij->aribsj", self.heads_ABRS, self.values_ABIJ),
        }


def _inside(
    found: list[Tensor], scale: Mapping[str, int], heads: tuple[Heads, Heads], rotary: bool, solve: Solve
) -> _Inside:
    """Heads inside groups, dimensions of values and (without rotary positions) of queries and keys, in turn: each is an
    assignment given the others."""
    a, b = heads

    def split(matrix: Tensor, with_heads: bool) -> Tensor:
        if with_heads:
            return matrix.view(a.groups, a.per_group, a.size, b.groups, b.per_group, b.size).permute(0, 3, 1, 2, 4, 5)
        return matrix.view(a.groups, a.size, b.groups, b.size).permute(0, 2, 1, 3)

    query_ABRISJ, key_ABIJ, value_ABIJ, mixed_ABRISJ = (
        split(matrix, word in ("query", "mixed")) for matrix, word in zip(found, BOUND)
    )
    pairs = (a.groups, b.groups)
    fixed_ABIJ = torch.eye(a.size).expand(*pairs, a.size, a.size)
    values_ABIJ = solve(value_ABIJ, scale["value"])
    keys_ABIJ = fixed_ABIJ if rotary else solve(key_ABIJ, scale["key"])
    heads_ABRS = torch.ones(*pairs, 1, 1)
    for _ in range(ROUNDS):
        before = heads_ABRS, values_ABIJ, keys_ABIJ
        if a.per_group > 1 or b.per_group > 1:
            similarity = torch.einsum("abrisj,abij->abrs", mixed_ABRISJ, values_ABIJ)
            similarity = similarity + torch.einsum("abrisj,abij->abrs", query_ABRISJ, keys_ABIJ)
            heads_ABRS = solve(similarity, b.size * (scale["mixed"] + scale["query"]))
        similarity = value_ABIJ + torch.einsum("abrisj,abrs->abij", mixed_ABRISJ, heads_ABRS)
        values_ABIJ = solve(similarity, scale["value"] + b.per_group * scale["mixed"])
        if not rotary:
            similarity = key_ABIJ + torch.einsum("abrisj,abrs->abij", query_ABRISJ, heads_ABRS)
            keys_ABIJ = solve(similarity, scale["key"] + b.per_group * scale["query"])
        if all(torch.equal(old, new) for old, new in zip(before, (heads_ABRS, values_ABIJ, keys_ABIJ))):
            break
    gain_AB = (value_ABIJ * values_ABIJ + key_ABIJ * keys_ABIJ).sum((2, 3))
    gain_AB = gain_AB + torch.einsum("abrisj,abrs,abij->ab", mixed_ABRISJ, heads_ABRS, values_ABIJ)
    gain_AB = gain_AB + torch.einsum("abrisj,abrs,abij->ab", query_ABRISJ, heads_ABRS, keys_ABIJ)
    terms = b.size * (scale["value"] + scale["key"] + b.per_group * (scale["mixed"] + scale["query"]))
    return _Inside(heads_ABRS, values_ABIJ, keys_ABIJ, gain_AB, terms)


def gain(similarities: Mapping[str, Tensor], maps: Mapping[str, Tensor]) -> float:
    """Sum of the similarities of units that are matched, fp64; a space without a map as it is."""
    total = 0.0
    for space, matrix_mn in similarities.items():
        units = maps.get(space)
        if units is None:
            total += matrix_mn.diagonal().double().sum().item()
        elif units.dim() == 1:
            total += matrix_mn.gather(0, units[None]).double().sum().item()
        else:
            total += (matrix_mn * units).double().sum().item()
    return total
