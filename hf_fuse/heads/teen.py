"""TEEN: new classes from few samples, their prototypes moved towards similar base classes.

(https://arxiv.org/abs/2312.05229.) A prototype of few samples is noisy, those of base classes are not; the more similar
a base class, the more it pulls.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_fuse.heads.head import Head, one_hot, softmax, unit


class Teen(Head):
    """Cosine classifier. ``fit`` learns the base classes; classes that ``partial_fit`` brings are new ones.

    Args:
        calibration: share of the base classes in a new prototype; 0 is the nearest mean by cosine.
        scale: of the similarities, in the calibration and in the probabilities.
    """

    STATE = ("sums_", "counts_", "is_base_")
    PER_CLASS = ("sums_", "counts_", "is_base_")

    def __init__(self, calibration: float = 0.5, scale: float = 16.0):
        self.calibration = calibration
        self.scale = scale

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Teen:
        """Adds samples; the first call brings the base classes."""
        X, numbers = self._samples(X, y)
        members_NC = one_hot(numbers, len(self.classes_))
        X, first = unit(X), not hasattr(self, "sums_")
        if first:
            self.sums_, self.counts_ = members_NC.T @ X, members_NC.sum(0)
            self.is_base_ = np.ones(len(self.classes_), dtype=np.uint8)
        else:
            self.sums_, self.counts_ = self.sums_ + members_NC.T @ X, self.counts_ + members_NC.sum(0)
        return self

    @property
    def prototypes_(self) -> np.ndarray:
        """``(C, D)``; those of base classes have length 1."""
        found = unit(self.sums_)
        base, new = found[self.is_base_ == 1], found[self.is_base_ == 0]
        pull = unit(softmax(self.scale * new @ base.T) @ base)
        found[self.is_base_ == 0] = (1 - self.calibration) * new + self.calibration * pull
        return found

    def scores(self, X: Any) -> np.ndarray:
        """Scaled cosines ``(N, C)``."""
        return self.scale * unit(self._features(X)) @ unit(self.prototypes_).T
