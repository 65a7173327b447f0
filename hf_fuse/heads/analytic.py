"""G-ACIL: ridge regression that is updated exactly, sample by sample or class by class.

(https://arxiv.org/abs/2403.15706.) Whatever the portions and their order, the head is the one that all data at once
would have given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from hf_fuse.heads.head import Head, features, one_hot

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

    def partial_fit(self, X: Any, y: Any) -> Analytic:
        """Adds samples."""
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}; expected a number above 0.")
        X = self._expanded(features(X))
        numbers = self._learned(y, len(X))
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

    def decision_function(self, X: Any) -> np.ndarray:
        """Regressed one-hot codes ``(N, C)``."""
        return self._expanded(self._features(X)) @ self.weights_.T

    def predict_proba(self, X: Any) -> np.ndarray:
        """The codes are estimates of probabilities: cut off below 0 and scaled to a sum of 1."""
        codes = np.maximum(self.decision_function(X), 1e-12)
        return codes / codes.sum(1, keepdims=True)

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``(C, D)`` and bias ``(C,)`` with the same predictions, but other probabilities."""
        self._fitted()
        if self.expansion is not None:
            raise ValueError("the expansion is not linear. Use expansion=None.")
        return self.weights_, np.zeros(len(self.classes_))
