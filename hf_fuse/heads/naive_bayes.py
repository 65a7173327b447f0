"""Gaussian naive Bayes with one variance per feature: the best head per second of computing from few samples.

(https://arxiv.org/abs/2302.02334.) It is linear, so it can also initialise a linear layer that is trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_fuse.heads.head import Head, one_hot


class NaiveBayes(Head):
    """Classes as Gaussians with their own means and common variances, weighed by how frequent they are.

    Args:
        variance_floor: added to each variance, as a share of the largest: of few samples some features are constant.
            The reference adds 1e-9 whatever the scale.
    """

    STATE = ("counts_", "means_", "squares_")
    PER_CLASS = ("counts_", "means_", "squares_")

    def __init__(self, variance_floor: float = 1e-6):
        self.variance_floor = variance_floor

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> NaiveBayes:
        """Adds samples: the result is that of all samples at once, to rounding."""
        X, numbers = self._samples(X, y)
        members_NC = one_hot(numbers, len(self.classes_))
        counts_C = members_NC.sum(0)
        means_CD = members_NC.T @ X / np.maximum(counts_C, 1)[:, None]
        # Around the mean of the portion, then moved to the common one: sums of squares would cancel.
        squares_CD = members_NC.T @ (X - members_NC @ means_CD) ** 2
        if not hasattr(self, "counts_"):
            self.counts_, self.means_, self.squares_ = counts_C, means_CD, squares_CD
            return self
        whole_C = self.counts_ + counts_C
        gap_CD, share_C = means_CD - self.means_, counts_C / np.maximum(whole_C, 1)
        self.squares_ = self.squares_ + squares_CD + gap_CD**2 * (self.counts_ * share_C)[:, None]
        self.means_ = self.means_ + gap_CD * share_C[:, None]
        self.counts_ = whole_C
        return self

    @property
    def variances_(self) -> np.ndarray:
        """``(D,)``: within classes, over all samples."""
        variances = self.squares_.sum(0) / self.counts_.sum()
        return variances + self.variance_floor * (variances.max() or 1.0)

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``(C, D)`` and bias ``(C,)`` with the same probabilities."""
        self._fitted()
        weights = self.means_ / self.variances_
        return weights, np.log(self.counts_ / self.counts_.sum()) - 0.5 * (self.means_ * weights).sum(1)

    def scores(self, X: Any) -> np.ndarray:
        """Joint log-probabilities ``(N, C)``, but for what is the same for all classes."""
        X = self._features(X)
        weights, bias = self.linear()
        return X @ weights.T + bias
