"""What classifiers of features share: classes that may grow, and checked input."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np

from hf_fuse.errors import FuseError
from hf_fuse.heads.saved import SavedEstimator

# After `saved`, which says what to install where scikit-learn is missing.
from sklearn.base import ClassifierMixin  # isort: skip
from sklearn.utils.multiclass import check_classification_targets  # isort: skip
from sklearn.utils.validation import check_array  # isort: skip

SomeHead = TypeVar("SomeHead", bound="Head")


class InputError(FuseError, ValueError):
    """Features or classes that a head can't take. A ValueError too, as the tools of scikit-learn expect."""


class Head(ClassifierMixin, SavedEstimator):
    """A classifier of features.

    Subclasses write :meth:`scores` and ``partial_fit(X, y, classes=None)``; most need not be told ``classes``, as
    scikit-learn's tools do: new ones may come at any time. Arrays of ``PER_CLASS`` have a row per class, and get rows
    of zeros when new classes come. N samples, D features, C classes.

    Attributes:
        classes_: ``(C,)``, sorted; numbers or strings.
        n_features_in_: D.
    """

    LEARNED: ClassVar[tuple[str, ...]] = ("classes_", "n_features_in_")
    PER_CLASS: ClassVar[tuple[str, ...]] = ()
    DIMENSIONS: ClassVar[int] = 2  # of X

    def fit(self: SomeHead, X: Any, y: Any) -> SomeHead:
        """Learns from features ``(N, D)`` and classes ``(N,)``, and forgets what was learned before."""
        self._forget()
        return self.partial_fit(X, y)

    def scores(self, X: Any) -> np.ndarray:
        """``(N, C)``: the highest is the prediction."""
        raise NotImplementedError

    def decision_function(self, X: Any) -> np.ndarray:
        """The scores ``(N, C)``; of two classes ``(N,)``, how much higher the second's is, as scikit-learn expects."""
        scores = self.scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The class of each sample ``(N,)``."""
        scores_NC = self.scores(X)
        return self.classes_[scores_NC.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(N, C)``: the softmax of the scores, where a head says nothing else."""
        return softmax(self.scores(X))

    def _features(self, X: Any) -> np.ndarray:
        """Features to predict from, ``(N, D)``, fp64."""
        self._fitted()
        return self._checked(X)

    def _samples(self, X: Any, y: Any, classes: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Features to learn from, and the number of each sample's class ``(N,)``, after room was made for new ones.

        Raises:
            InputError: ``X`` or ``y`` can't be taken; nothing has changed then.
        """
        X = self._checked(X)
        y = labels(y, len(X))
        before = getattr(self, "classes_", y[:0])
        found = joined(before, y if classes is None else joined(labels(classes), y))
        if len(found) > len(before):
            if len(before):
                self._make_room(found, np.searchsorted(found, before))
            self.classes_ = found
        self.n_features_in_ = X.shape[-1]
        return X, np.searchsorted(found, y)

    def _make_room(self, classes: np.ndarray, places: np.ndarray) -> None:
        """Takes up new classes; ``places`` are those of the old ones among all."""
        for name in self.PER_CLASS:
            old = getattr(self, name)
            new = np.zeros((len(classes), *old.shape[1:]), old.dtype)
            new[places] = old
            setattr(self, name, new)

    def _no_new_classes(self) -> None:
        raise InputError(f"{type(self).__name__} can't learn new classes. Call fit with all of them.")

    def _checked(self, X: Any) -> np.ndarray:
        X = self._numbers(X)
        known = getattr(self, "n_features_in_", X.shape[-1])
        if X.shape[-1] != known:
            raise InputError(
                f"X has {X.shape[-1]} features, but {type(self).__name__} is expecting {known} features as input."
            )
        return X

    def _numbers(self, X: Any) -> np.ndarray:
        return features(X, self.DIMENSIONS)


def features(X: Any, dimensions: int = 2) -> np.ndarray:
    """``X`` as finite fp64 numbers; tensors of any device and dtype are taken too.

    Raises:
        InputError: another number of dimensions, no samples, or numbers that are not finite.
    """
    try:
        X = check_array(on_the_cpu(X, "double"), dtype=np.float64, allow_nd=dimensions > 2)
    except (TypeError, ValueError) as error:
        raise InputError(f"X: {str(error).strip().splitlines()[0]}") from None
    if X.ndim != dimensions:
        raise InputError(f"X has the shape {X.shape}; expected {dimensions} dimensions.")
    return X


def on_the_cpu(X: Any, dtype: str) -> Any:
    """Tensors as arrays; numpy knows no bfloat16. Anything else as it is."""
    return getattr(X.detach().cpu(), dtype)().numpy() if hasattr(X, "detach") else X


def labels(y: Any, count: int | None = None) -> np.ndarray:
    """Classes ``(N,)``: whole numbers, booleans or strings.

    Raises:
        InputError: not one class per sample, or something else than classes.
    """
    y = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or count not in (None, len(y)):
        raise InputError(
            f"y should be a 1d array: it has the shape {y.shape}; expected one class for each of {count} samples."
        )
    if y.dtype.kind == "O":
        if len({isinstance(value, str) for value in y}) > 1:
            raise InputError("y: some classes are strings and others are not. Name them alike.")
        y = np.array(y.tolist())
    try:
        check_classification_targets(y)
    except (TypeError, ValueError) as error:
        raise InputError(f"y: {str(error).strip().splitlines()[0]}") from None
    return y


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """All classes of both, sorted.

    Raises:
        InputError: one has strings, the other numbers.
    """
    if len(first) and (first.dtype.kind == "U") != (second.dtype.kind == "U"):
        raise InputError("y: some classes are strings and others numbers. Name them alike.")
    return np.union1d(first, second)


def one_hot(numbers: np.ndarray, classes: int) -> np.ndarray:
    """``(N,)`` -> ``(N, C)``."""
    return np.eye(classes)[numbers]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
