"""Random numbers that are the same on every process and in every micro-batch of an optimizer step."""

from __future__ import annotations

import numpy as np


def random_of_step(seed: int, step: int) -> np.random.Generator:
    """NumPy's, since torch can't draw from a beta distribution with a generator of one's own."""
    return np.random.default_rng((seed, step))
