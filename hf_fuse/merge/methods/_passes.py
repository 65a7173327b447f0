"""What a method may ask of the whole tensor or model before it merges: a number of additive passes.

``measure`` is a generator. It yields a :class:`Pass`, is sent the pass's total over all blocks, may yield more passes
that depend on it, and returns the state for the method. Totals are sums, so threads and ranks can each see a part:
integer totals are exact in any order, floating totals are added in a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hf_fuse.merge.methods._random import TensorRandom

Measurement = Generator["Pass", Tensor, Any]


@dataclass(frozen=True)
class Place:
    """Where a block lies: the tensor, its shape, and the block's first element in it."""

    tensor: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Seen:
    """What a block belongs to: the options that hold for its tensor, its random numbers, its place, and the base's
    weights there (shaped as one model's part of the block; None if the method does without a base)."""

    options: dict[str, Any]
    random: TensorRandom
    place: Place
    base: Tensor | None = None


@dataclass
class Pass:
    """``add(block_KN, total, seen)`` adds what it sees to ``total`` in place; ``total`` starts as given, at zero.

    With ``share > 1``, a power of two, about 1/share of the elements is read: the first part of every other block.
    ``of="statistics"`` hands over the models' statistics instead of their weights.
    """

    total: Any
    add: Callable[[Tensor, Any, Seen], None]
    share: int = 1
    of: Literal["models", "statistics"] = "models"

    @property
    def sees_all_weights(self) -> bool:
        return self.share == 1 and self.of == "models"
