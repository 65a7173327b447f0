"""What a method may ask of the whole tensor or model before it merges: a number of additive passes.

``measure`` is a generator. It yields a :class:`Pass`, is sent the pass's total over all blocks, may yield more passes
that depend on it, and returns the state for the method. Totals are sums, so threads and ranks can each see a part:
integer totals are exact in any order, floating totals are added in a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_fuse.merge.methods._random import TensorRandom

Measurement = Generator["Pass", Tensor, Any]


@dataclass(frozen=True)
class Seen:
    """What a block belongs to: the options that hold for its tensor, and its random numbers."""

    options: dict[str, Any]
    random: TensorRandom


@dataclass
class Pass:
    """``add(block_KN, total, seen)`` adds what it sees to ``total`` in place; ``total`` starts as given, at zero.

    With ``share > 1`` only the first 1/share of every block is read: a stratified sample.
    """

    total: Tensor
    add: Callable[[Tensor, Tensor, Seen], None]
    share: int = 1
