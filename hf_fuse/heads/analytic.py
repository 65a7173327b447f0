"""G-ACIL: ridge regression that is updated exactly, sample by sample or class by class.

(https://arxiv.org/abs/2403.15706.) Whatever the portions and their order, the head is the one that all data at once
would have given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from hf_fuse.heads.head import Head, one_hot

BLOCK = 512  # samples per update: the update solves a system of this size


class Analytic(Head):
    """Recursive ridge regression on one-hot classes, fp64. Memory: E^2 numbers, for E features after the expansion.

    Args:
        ridge: strength of the regularisation.
        expansion: width E of a fixed random layer with ReLU in front; none: the features themselves.
        seed: of that layer.
    """

    STATE = ("inverse_", "weights_")
    PER_CLASS = ("weights_",)

    def __init__(self, ridge: float = 0.1, expansion: int | None = None, seed: int = 0):
        self.ridge = ridge
        self.expansion = expansion
        self.seed = seed

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Analytic:
        """Adds samples."""
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}; expected a number above 0.")
        X, numbers = self._samples(X, y)
        X = self._expanded(X)
        if not hasattr(self, "inverse_"):
            self.inverse_ = np.eye(X.shape[1]) / self.ridge
            self.weights_ = np.zeros((len(self.classes_), X.shape[1]))
        for start in range(0, len(X), BLOCK):
            self._update(X[start : start + BLOCK], one_hot(numbers[start : start + BLOCK], len(self.classes_)))
        return self

    def _update(self, X: np.ndarray, targets_NC: np.ndarray) -> None:
        """One step of recursive least squares (Woodbury)."""
        gain_EN = self.inverse_ @ X.T
        factor = cho_factor(np.eye(len(X)) + X @ gain_EN)
        inverse = self.inverse_ - gain_EN @ cho_solve(factor, gain_EN.T)
        self.inverse_ = (inverse + inverse.T) / 2  # rounding would let it drift from symmetric
        self.weights_ = self.weights_ + (targets_NC - X @ self.weights_.T).T @ X @ self.inverse_

    def _expanded(self, X: np.ndarray) -> np.ndarray:
        if self.expansion is None:
            return X
        draw = np.random.default_rng(self.seed)
        return np.maximum(X @ (draw.standard_normal((X.shape[1], self.expansion)) / np.sqrt(X.shape[1])), 0)

    def scores(self, X: Any) -> np.ndarray:
        """Regressed one-hot codes ``(N, C)``."""
        return self._expanded(self._features(X)) @ self.weights_.T

    def predict_proba(self, X: Any) -> np.ndarray:
        """The codes are estimates of probabilities: the nearest ones to them, in the Euclidean sense."""
        codes_NC = self.scores(X)
        sorted_NC = -np.sort(-codes_NC, axis=1)
        excess_NC = (sorted_NC.cumsum(1) - 1) / np.arange(1, codes_NC.shape[1] + 1)
        kept_N = (sorted_NC > excess_NC).sum(1)
        return np.maximum(codes_NC - excess_NC[np.arange(len(codes_NC)), kept_N - 1, None], 0)

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``(C, D)`` and bias ``(C,)`` with the same predictions, but other probabilities."""
        self._fitted()
        if self.expansion is not None:
            raise ValueError("the expansion is not linear. Use expansion=None.")
        return self.weights_, np.zeros(len(self.classes_))
