"""Artificial prediction market: classifiers bet on the class, and those that were right have more to bet with next
time.

(https://arxiv.org/abs/1102.1465.) The price of a class is the wealth-weighted mean of the classifiers' probabilities.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hf_fuse.heads.head import Head, InputError


class PredictionMarket(Head):
    """Combines M classifiers, by constant betting. ``X`` are their probabilities ``(N, M, C)``, columns as
    ``classes_``.

    Args:
        stake: share of its wealth that each classifier bets on a sample.

    Attributes:
        budgets_: ``(M,)``, with sum 1.
    """

    STATE = ("budgets_",)
    DIMENSIONS: ClassVar[int] = 3

    def __init__(self, stake: float = 0.1):
        self.stake = stake

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> PredictionMarket:
        """Settles the bets on each sample, in order.

        Args:
            classes: all C of them; needed in the first call if ``y`` does not have all.

        Raises:
            InputError: classes that are not one per column, or another number of classifiers than before.
        """
        X, numbers = self._samples(X, y, classes)
        if len(self.classes_) != X.shape[2]:
            found = len(self.classes_)
            self._forget()
            raise InputError(f"y holds {found} classes, but X has {X.shape[2]} columns. Say all of them in classes.")
        budgets = getattr(self, "budgets_", np.full(X.shape[1], 1 / X.shape[1]))
        for bets_M in X[np.arange(len(X)), :, numbers]:
            price = budgets @ bets_M
            if price > 0:  # nobody thought this class possible: nobody wins
                budgets = (1 - self.stake) * budgets + self.stake * budgets * bets_M / price
        self.budgets_ = budgets
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Prices ``(N, C)``."""
        return np.einsum("m,nmc->nc", self.budgets_, self._features(X))

    scores = predict_proba

    def _make_room(self, classes: np.ndarray, places: np.ndarray) -> None:
        self._no_new_classes()

    def _checked(self, X: Any) -> np.ndarray:
        X = super()._checked(X)
        if hasattr(self, "budgets_") and X.shape[1] != len(self.budgets_):
            raise InputError(f"X is of {X.shape[1]} classifiers, but the market has {len(self.budgets_)}.")
        return X
