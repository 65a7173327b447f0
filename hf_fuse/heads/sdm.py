"""SDM: a softmax that knows how alike the training samples were that it learned the class from.

(Similarity-Distance-Magnitude, https://arxiv.org/abs/2502.20167.) The logits are scaled by how many of the nearest
training samples were predicted rightly and as this class (q), and by how near the nearest is (d): far from the training
data the probabilities become uniform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax

from hf_fuse.heads.head import Head, joined, labels


def sdm(logits_NC: np.ndarray, similarity_N: np.ndarray, distance_N: np.ndarray) -> np.ndarray:
    """Log-probabilities ``(N, C)``: ``log softmax(log(2 + q) d z)``. With ``q = e - 2`` and ``d = 1`` a plain softmax.

    Args:
        logits_NC: z.
        similarity_N: q, at least 0.
        distance_N: d, 0 (far from all training data) to 1.
    """
    scale_N = np.log(2 + np.asarray(similarity_N, dtype=np.float64)) * np.asarray(distance_N)
    return log_softmax(scale_N[:, None] * np.asarray(logits_NC, dtype=np.float64), axis=1)


def sdm_loss(logits_NC: np.ndarray, labels_N: np.ndarray, similarity_N: np.ndarray, distance_N: np.ndarray) -> float:
    """Mean negative log-likelihood, each sample's in base ``2 + q``."""
    found = sdm(logits_NC, similarity_N, distance_N)[np.arange(len(labels_N)), labels_N]
    return float(-(found / np.log(2 + np.asarray(similarity_N))).mean())


class Sdm(Head):
    """Multinomial logistic regression whose probabilities are those of :func:`sdm`; keeps all training features.

    Args:
        regularization: C of scikit-learn's LogisticRegression.
        neighbours: most samples that q counts.
    """

    STATE = ("weights_", "bias_", "bank_", "bank_labels_", "bank_predicted_", "bank_distances_")

    def __init__(self, regularization: float = 1.0, neighbours: int = 64):
        self.regularization = regularization
        self.neighbours = neighbours

    def fit(self, X: Any, y: Any) -> Sdm:
        from sklearn.linear_model import LogisticRegression

        self._forget()
        X, labels_N = self._samples(X, y)
        model = LogisticRegression(C=self.regularization, max_iter=1000).fit(X, labels_N)
        two = len(self.classes_) == 2  # scikit-learn keeps one row for two classes
        self.weights_ = np.concatenate([-model.coef_, model.coef_]) / 2 if two else model.coef_
        self.bias_ = np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
        self.bank_, self.bank_labels_ = X, labels_N
        self.bank_predicted_ = self._logits(X).argmax(1)
        distances, _ = self._neighbours(X, 2)
        # By class: how far the nearest other training sample is, in order: the empirical distribution of distances.
        order = np.lexsort((distances[:, 1], labels_N))
        self.bank_distances_ = np.stack([labels_N[order].astype(float), distances[order, 1]])
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Sdm:
        """Learns again from the kept samples and the new ones."""
        if not hasattr(self, "bank_"):
            return self.fit(X, y)
        X = self._checked(X)
        y, before = labels(y, len(X)), self.classes_[self.bank_labels_]
        joined(before, y)
        return self.fit(np.concatenate([self.bank_, X]), np.concatenate([before, y]))

    def similarity_and_distance(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """q ``(N,)`` and d ``(N,)`` of samples."""
        X = self._features(X)
        distances, nearest = self._neighbours(X, min(self.neighbours, len(self.bank_)))
        predicted_N = self._logits(X).argmax(1)
        labels_NK = self.bank_labels_[nearest]
        agrees = (labels_NK == predicted_N[:, None]) & (self.bank_predicted_[nearest] == labels_NK)
        similarity = np.cumprod(agrees, axis=1).sum(1)
        labels, ordered = self.bank_distances_[0].astype(int), self.bank_distances_[1]
        shares = []
        for number in range(len(self.classes_)):
            of_class = ordered[labels == number]
            shares.append(1 - np.searchsorted(of_class, distances[:, 0], side="left") / max(len(of_class), 1))
        return similarity, np.min(shares, axis=0)

    def predict(self, X: Any) -> np.ndarray:
        """The class of each sample ``(N,)``: that of the highest logit, even where the probabilities are uniform."""
        X = self._features(X)
        return self.classes_[self._logits(X).argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(N, C)``."""
        return np.exp(self.scores(X))

    def scores(self, X: Any) -> np.ndarray:
        """Log-probabilities ``(N, C)``."""
        similarity_N, distance_N = self.similarity_and_distance(X)
        return sdm(self._logits(self._features(X)), similarity_N, distance_N)

    def _logits(self, X: np.ndarray) -> np.ndarray:
        return X @ self.weights_.T + self.bias_

    def _neighbours(self, X: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.neighbors import NearestNeighbors

        return NearestNeighbors(n_neighbors=min(count, len(self.bank_))).fit(self.bank_).kneighbors(X)
