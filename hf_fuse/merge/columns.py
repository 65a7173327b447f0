"""Which merging coefficient belongs to which element: one for all, or one per block, tensor, or chunk of a tensor.

The coefficients of K models are one matrix ``[K, G]``. Every tensor has its columns in it; tensors may share one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from hf_fuse.errors import RecipeError
from hf_fuse.merge.parameters import is_at_the_end, layer_of
from hf_fuse.merge.units import Unit

Granularity = Literal["task", "block", "tensor", "chunk"]


@dataclass(frozen=True)
class Columns:
    """The coefficients of one tensor: ``count`` columns from ``first`` on.

    Attributes:
        learned: otherwise they stay as they are, and no gradient is computed for the tensor.
    """

    first: int
    count: int = 1
    learned: bool = True


def columns(
    units: Iterable[Unit],
    granularity: Granularity,
    *,
    chunks: int | Mapping[str, int] = 1,
    blocks: str | None = None,
    learned: Collection[str] | None = None,
) -> tuple[dict[str, Columns], int]:
    """Columns of every tensor, and how many there are in all.

    Args:
        chunks: per tensor, or for each by name; at most one per element. 0 leaves the tensor one that isn't learned.
        blocks: regular expression; tensors in whose names it finds the same text share a block, and so do all others.
            By default a block is a layer, and what comes before and after the layers is one each.
        learned: names of the tensors to learn for, if not for all; the others have the last column, not learned.

    Raises:
        RecipeError: ``blocks`` is no expression, or finds nothing.
    """
    units = list(units)
    chosen = [unit for unit in units if learned is None or unit.name in learned]
    found: dict[str, Columns] = {}
    if granularity in ("task", "block"):
        keys = {unit.name: None if granularity == "task" else _block(unit.name, blocks) for unit in chosen}
        if granularity == "block" and blocks is not None and not any(keys.values()):
            raise RecipeError(
                f"parameters: blocks is {blocks!r}, which is in no tensor's name. One of them: {chosen[0].name}."
            )
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
        found, count = {name: Columns(numbers[key]) for name, key in keys.items()}, len(numbers)
    else:
        count = 0
        for unit in chosen:
            wanted = 1 if granularity == "tensor" else chunks if isinstance(chunks, int) else chunks.get(unit.name, 0)
            found[unit.name] = Columns(count, max(1, min(wanted, unit.numel)), wanted > 0)
            count += found[unit.name].count
    if len(chosen) < len(units):
        found |= {unit.name: Columns(count, learned=False) for unit in units if unit.name not in found}
        count += 1
    return found, count


def _block(name: str, pattern: str | None) -> object:
    if pattern is None:
        return layer_of(name) or is_at_the_end(name)
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise RecipeError(f"parameters: blocks is {pattern!r}, not a regular expression ({error}).") from None
    return found and found[0]
