"""Random numbers that depend on (seed, tensor, model, position) only: order, chunks, ranks and devices don't matter.

A counter-based generator: element e of a tensor gets 16 bits of a keyed 32-bit integer hash of e // 2. No state is
carried, so any piece of any tensor can be drawn at any time.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

STEPS = 1 << 16  # resolution of a probability


class TensorRandom:
    """The random numbers of one tensor from element ``start`` on."""

    def __init__(self, seed: int, tensor: str, start: int = 0):
        self.seed, self.tensor, self.start = seed, tensor, start

    def bits(self, model: int, count: int) -> np.ndarray:
        """``count`` uniform uint16 for one model."""
        digest = hashlib.sha256(f"{self.seed}\0{self.tensor}\0{model}".encode()).digest()
        first, high = self.start // 2 & 0xFFFFFFFF, self.start // 2 >> 32
        key, key2 = (np.uint32(int.from_bytes(digest[i : i + 4], "little")) for i in (4 * (high % 7), 28))
        odd = self.start % 2  # a block of rows may begin at any element
        value = np.arange((count + odd + 1) // 2, dtype=np.uint32)
        value += np.uint32((first + int(key)) & 0xFFFFFFFF)
        value ^= value >> np.uint32(16)
        value *= np.uint32(0x7FEB352D)
        value ^= value >> np.uint32(15)
        value ^= key2
        value *= np.uint32(0x846CA68B)
        value ^= value >> np.uint32(16)
        return value.view(np.uint16)[odd : odd + count]

    def keep(self, model: int, density: float, like_N: Tensor) -> tuple[Tensor, float]:
        """A 0/1 mask ``[N]`` that keeps each element with probability ``density``, and that probability as it was
        rounded to 1/65536: dividing by it keeps the expectation exact."""
        threshold = min(max(round(density * STEPS), 0), STEPS)
        if threshold == STEPS:
            return torch.ones_like(like_N), 1.0
        kind = np.float64 if like_N.dtype == torch.float64 else np.float32
        mask = (self.bits(model, like_N.numel()) < threshold).astype(kind)  # numpy is faster here than torch
        return torch.from_numpy(mask).to(like_N.device), threshold / STEPS
