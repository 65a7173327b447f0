"""COSMO: joins an expert of seen classes and one of unseen classes by a gate that knows when the first is confident.

(https://arxiv.org/abs/1812.09903.) Each expert's classes get some probability even when the gate points to the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from hf_fuse.errors import FuseError
from hf_fuse.heads.head import InputError, features
from hf_fuse.heads.saved import SavedEstimator


def gated(seen_NS: np.ndarray, unseen_NU: np.ndarray, gate_N: np.ndarray, *, normalize: bool = True) -> np.ndarray:
    """Probabilities ``(N, S + U)`` of both experts' classes, seen ones first.

    Args:
        seen_NS, unseen_NU: the experts' probabilities.
        gate_N: how much the unseen expert counts, 0 to 1.
        normalize: scales to a sum of 1, which the published formula does not.
    """
    gate = np.asarray(gate_N, dtype=np.float64)[:, None]
    seen = (1 - gate) * (seen_NS + gate / np.shape(seen_NS)[1])
    unseen = gate * (unseen_NU + (1 - gate) / np.shape(unseen_NU)[1])
    joined = np.concatenate([seen, unseen], axis=1)
    return joined / joined.sum(1, keepdims=True) if normalize else joined


class Cosmo(SavedEstimator):
    """The gate, and the joined prediction.

    Args:
        threshold: confidence in "seen" at which both experts count the same.
        sharpness: temperature T of the gate's sigmoid: smaller is sharper.
        top: how many of each expert's highest probabilities the gate looks at.
        temperatures: at which it looks at them.
    """

    STATE = ("weights_", "bias_")
    LEARNED = ("n_seen_", "n_unseen_")

    def __init__(
        self,
        threshold: float = 0.5,
        sharpness: float = 0.1,
        top: int = 5,
        temperatures: tuple[float, ...] = (0.5, 1.0, 2.0),
    ):
        self.threshold = threshold
        self.sharpness = sharpness
        self.top = top
        self.temperatures = temperatures

    def fit(self, seen_NS: Any, unseen_NU: Any, is_seen_N: Any) -> Cosmo:
        """Learns the gate from both experts' probabilities of samples whose class is one of the seen or not.

        Raises:
            FuseError: all samples are of one kind.
        """
        from sklearn.linear_model import LogisticRegression

        is_seen_N = np.asarray(is_seen_N, dtype=bool)
        if is_seen_N.all() or not is_seen_N.any():
            raise FuseError(
                "is_seen: all samples are of one kind. Hold some classes out and let them be the unseen ones."
            )
        self._forget()
        model = LogisticRegression(max_iter=1000).fit(self._confidences(seen_NS, unseen_NU), is_seen_N)
        self.weights_, self.bias_ = model.coef_[0], model.intercept_
        self.n_seen_, self.n_unseen_ = np.shape(seen_NS)[1], np.shape(unseen_NU)[1]
        return self

    def gate(self, seen_NS: Any, unseen_NU: Any) -> np.ndarray:
        """How much the unseen expert counts ``(N,)``."""
        self._fitted()
        confidence_N = expit(self._confidences(seen_NS, unseen_NU) @ self.weights_ + self.bias_)
        return expit((self.threshold - confidence_N) / self.sharpness)

    def predict_proba(self, seen_NS: Any, unseen_NU: Any) -> np.ndarray:
        """Probabilities ``(N, S + U)``, seen classes first."""
        return gated(features(seen_NS), features(unseen_NU), self.gate(seen_NS, unseen_NU))

    def _confidences(self, seen_NS: Any, unseen_NU: Any) -> np.ndarray:
        found, pair = [], (features(seen_NS), features(unseen_NU))
        known = getattr(self, "n_seen_", pair[0].shape[1]), getattr(self, "n_unseen_", pair[1].shape[1])
        if len(pair[0]) != len(pair[1]) or (pair[0].shape[1], pair[1].shape[1]) != known:
            raise InputError(
                f"probabilities of the shapes {pair[0].shape} and {pair[1].shape}; expected the same samples, and "
                f"{known[0]} and {known[1]} classes."
            )
        for probabilities in pair:
            logs = np.log(np.maximum(probabilities, 1e-12))
            for temperature in self.temperatures:
                raised = np.exp((logs - logs.max(1, keepdims=True)) / temperature)
                found.append(-np.sort(-raised / raised.sum(1, keepdims=True), axis=1)[:, : self.top])
        return np.concatenate(found, axis=1)
