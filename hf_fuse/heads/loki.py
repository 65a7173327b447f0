"""Loki: predicts among more labels than a classifier knows, by distances between labels.

(https://arxiv.org/abs/2307.12226.) The prediction is the label with the least expected squared distance to the truth,
which may be one never observed.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.heads.head import ClassifierMixin, Head
from hf_fuse.heads.saved import BaseEstimator

FILE = "loki.json"


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
        estimator: classifier with ``predict_proba`` and ``classes_``: any head, or one of scikit-learn's. If it is
            fitted, this needs no ``fit``.
        labels: all V labels, with those that the estimator knows.
        distances: ``(V, V)`` between them, as from :func:`tree_distances` or of class embeddings.

    Attributes:
        estimator_: the fitted classifier; ``estimator`` itself stays as it was.
    """

    def __init__(self, estimator: Any, labels: Sequence[Hashable], distances: Any):
        self.estimator = estimator
        self.labels = labels
        self.distances = distances

    def fit(self, X: Any, y: Any) -> Loki:
        """Fits a copy of the estimator."""
        self.estimator_ = copy.deepcopy(self.estimator).fit(X, y)
        return self

    def partial_fit(self, X: Any, y: Any) -> Loki:
        """Adds samples to what the estimator has learned."""
        self.estimator_ = copy.deepcopy(self._estimator).partial_fit(X, y)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self._estimator, "classes_")

    @property
    def _estimator(self) -> Any:
        return getattr(self, "estimator_", self.estimator)

    @property
    def classes_(self) -> np.ndarray:
        return np.asarray(self.labels)

    def decision_function(self, X: Any) -> np.ndarray:
        """Negative expected squared distances ``(N, V)``.

        Raises:
            FuseError: the matrix of distances does not fit the labels, or lacks one that the estimator knows.
        """
        probabilities_NK = self._estimator.predict_proba(X)
        distances = np.asarray(self.distances, dtype=np.float64)
        places = {label: place for place, label in enumerate(self.labels)}
        if distances.shape != (len(places), len(places)):
            raise FuseError(f"distances have the shape {distances.shape}; expected a row and column per label.")
        known = self._estimator.classes_.tolist()
        if lost := [label for label in known if label not in places]:
            raise FuseError(f"labels: the estimator knows {lost[0]!r}, which is not among them.")
        return -expected_distances(probabilities_NK, distances[:, [places[label] for label in known]])

    def predict(self, X: Any) -> np.ndarray:
        """A label for each sample ``(N,)``; of equals, the first."""
        return self.classes_[self.decision_function(X).argmax(1)]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the classifier, which has to be a :class:`~hf_fuse.heads.head.Head`, and beside it the labels."""
        if not isinstance(self._estimator, Head):
            raise FuseError(f"{type(self._estimator).__name__}: is no head, so that it is not saved with Loki.")
        folder = self._estimator.save_pretrained(folder).parent
        said = {"labels": self.classes_.tolist(), "distances": np.asarray(self.distances).tolist()}
        (folder / FILE).write_text(json.dumps(said) + "\n", encoding="utf-8")
        return folder / FILE

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Loki:
        """Reads what :meth:`save_pretrained` has written.

        Raises:
            CheckpointError: no such folder, or it is damaged.
        """
        file = Path(folder).expanduser() / FILE
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            return cls(Head.from_pretrained(folder), said["labels"], said["distances"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: is no file of Loki or is damaged ({error}). Save it again.") from None


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
