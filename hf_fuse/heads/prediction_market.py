"""Artificial prediction market: classifiers bet on the class, and those that were right have more to bet with next
time.

(https://arxiv.org/abs/1102.1465.) The price of a class is the wealth-weighted mean of the classifiers' probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_fuse.errors import FuseError
from hf_fuse.heads.head import Head, features


class PredictionMarket(Head):
    """Combines M classifiers, by constant betting. ``X`` are their probabilities ``(N, M, C)``, columns as
    ``classes_``.

    Args:
        stake: share of its wealth that each classifier bets on a sample.

    Attributes:
        budgets_: ``(M,)``, with sum 1.
    """

    STATE = ("budgets_",)

    def __init__(self, stake: float = 0.1):
        self.stake = stake

    def partial_fit(self, X: Any, y: Any) -> PredictionMarket:
        """Settles the bets on each sample, in order. The first call has to bring all C classes.

        Raises:
            FuseError: classes that are not one per column.
        """
        X = features(X, 3)
        numbers = self._learned(y, len(X))
        if len(self.classes_) != X.shape[2]:
            raise FuseError(
                f"y holds {len(self.classes_)} classes, but X has {X.shape[2]} columns. They have to be the same."
            )
        budgets = getattr(self, "budgets_", np.full(X.shape[1], 1 / X.shape[1]))
        for bets_M in X[np.arange(len(X)), :, numbers]:
            price = budgets @ bets_M
            if price > 0:  # nobody thought this class possible: nobody wins
                budgets = (1 - self.stake) * budgets + self.stake * budgets * bets_M / price
        self.budgets_ = budgets
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Prices ``(N, C)``."""
        self._fitted()
        return np.einsum("m,nmc->nc", self.budgets_, features(X, 3))

    decision_function = predict_proba
