"""Nearest class mean: a sample belongs to the class whose mean is closest; the baseline of every feature pipeline.

Needs nothing but sums, so classes and samples may come in any order and in any portions.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from hf_fuse.heads.head import Head, one_hot, unit


class NearestMean(Head):
    """NMC.

    Args:
        metric: ``euclidean``, or ``cosine``: features are scaled to length 1 first.
        scale: of the scores before the softmax; the prediction does not depend on it.
    """

    STATE = ("sums_", "counts_")
    PER_CLASS = ("sums_", "counts_")

    def __init__(self, metric: Literal["euclidean", "cosine"] = "euclidean", scale: float = 1.0):
        self.metric = metric
        self.scale = scale

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> NearestMean:
        """Adds samples."""
        X, numbers = self._samples(X, y)
        members_NC = one_hot(numbers, len(self.classes_))
        if not hasattr(self, "sums_"):
            self.sums_ = np.zeros((len(self.classes_), X.shape[1]))
            self.counts_ = np.zeros(len(self.classes_))
        self.sums_ = self.sums_ + members_NC.T @ X
        self.counts_ = self.counts_ + members_NC.sum(0)
        return self

    @property
    def means_(self) -> np.ndarray:
        """``(C, D)``; of length 1 for cosine."""
        means = self.sums_ / self.counts_[:, None]
        return unit(means) if self.metric == "cosine" else means

    def scores(self, X: Any) -> np.ndarray:
        X = self._features(X)
        weights, bias = self._affine()
        return X @ weights.T + bias

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``(C, D)`` and bias ``(C,)`` with the same probabilities; for ``euclidean``."""
        self._fitted()
        if self.metric == "cosine":
            raise ValueError("a cosine head scales each sample to length 1, which is not linear. Use metric=euclidean.")
        return self._affine()

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        # |h - m|^2 / 2 without |h|^2, which is the same for all classes.
        means = self.means_
        bias = -0.5 * (means**2).sum(1) if self.metric == "euclidean" else np.zeros(len(means))
        return self.scale * means, self.scale * bias

    def _numbers(self, X: Any) -> np.ndarray:
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric is {self.metric!r}; expected euclidean or cosine.")
        return unit(super()._numbers(X)) if self.metric == "cosine" else super()._numbers(X)
