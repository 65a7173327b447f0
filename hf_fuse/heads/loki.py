"""Loki: predicts among more labels than a classifier knows, by distances between labels.

(https://arxiv.org/abs/2307.12226.) The prediction is the label with the least expected squared distance to the truth,
which may be one never observed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_fuse.errors import FuseError
from hf_fuse.heads.head import BaseEstimator, ClassifierMixin


def expected_distances(probabilities_NK: np.ndarray, distances_VK: np.ndarray) -> np.ndarray:
    """Expected squared distance ``(N, V)`` of each of V labels to the truth, which is one of K observed labels.

    Args:
        probabilities_NK: not logits; how sharp they are matters.
        distances_VK: between all labels and the observed ones.
    """
    return np.asarray(probabilities_NK) @ (np.asarray(distances_VK) ** 2).T


class Loki(ClassifierMixin, BaseEstimator):
    """Another classifier's probabilities, decoded among all labels.

    Args:
        estimator: classifier with ``predict_proba`` and ``classes_``: any head, or one of scikit-learn's.
        labels: all V labels, with those that the estimator knows.
        distances: ``(V, V)`` between them, as from :func:`tree_distances` or of class embeddings.
    """

    def __init__(self, estimator: Any, labels: Sequence[Hashable], distances: Any):
        self.estimator = estimator
        self.labels = labels
        self.distances = distances

    def fit(self, X: Any, y: Any) -> Loki:
        """Fits the estimator."""
        self.estimator.fit(X, y)
        return self

    def partial_fit(self, X: Any, y: Any) -> Loki:
        """Adds samples to the estimator."""
        self.estimator.partial_fit(X, y)
        return self

    @property
    def classes_(self) -> np.ndarray:
        return np.asarray(self.labels)

    def decision_function(self, X: Any) -> np.ndarray:
        """Negative expected squared distances ``(N, V)``.

        Raises:
            FuseError: the matrix of distances does not fit the labels, or lacks one that the estimator knows.
        """
        distances = np.asarray(self.distances, dtype=np.float64)
        places = {label: place for place, label in enumerate(self.labels)}
        if distances.shape != (len(places), len(places)):
            raise FuseError(f"distances have the shape {distances.shape}; expected a row and column per label.")
        known = self.estimator.classes_.tolist()
        if lost := [label for label in known if label not in places]:
            raise FuseError(f"labels: the estimator knows {lost[0]!r}, which is not among them.")
        return -expected_distances(self.estimator.predict_proba(X), distances[:, [places[label] for label in known]])

    def predict(self, X: Any) -> np.ndarray:
        """A label for each sample ``(N,)``; of equals, the first."""
        return self.classes_[self.decision_function(X).argmax(1)]


def tree_distances(parents: Mapping[Hashable, Hashable], labels: Sequence[Hashable]) -> np.ndarray:
    """Lengths ``(V, V)`` of the paths between labels in a hierarchy.

    Args:
        parents: node -> the node above it.
        labels: leaves or inner nodes.

    Raises:
        FuseError: a label that is not in the hierarchy, or two that no path joins.
    """
    neighbours: dict[Hashable, list] = {}
    for child, parent in parents.items():
        neighbours.setdefault(child, []).append(parent)
        neighbours.setdefault(parent, []).append(child)
    rows = []
    for label in labels:
        lengths, waiting = {label: 0}, deque([label])
        while waiting:
            node = waiting.popleft()
            for other in neighbours.get(node, ()):
                if other not in lengths:
                    lengths[other] = lengths[node] + 1
                    waiting.append(other)
        if lost := [other for other in labels if other not in lengths]:
            raise FuseError(f"no path in the hierarchy joins {label!r} and {lost[0]!r}.")
        rows.append([lengths[other] for other in labels])
    return np.array(rows, dtype=np.float64)
