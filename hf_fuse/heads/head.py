"""What all heads share: classes that may grow, checked input, one file on disk."""

from __future__ import annotations

import json
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.heads import HEADS

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.base import TransformerMixin as TransformerMixin  # for features.py
    from sklearn.exceptions import NotFittedError
except ImportError:
    raise FuseError('heads need scikit-learn, which is not installed. Run: pip install "hf-fuse[heads]"') from None

FILE = "head.safetensors"
SomeHead = TypeVar("SomeHead", bound="Head")


class Head(ClassifierMixin, BaseEstimator):
    """A classifier of features.

    Subclasses say in ``STATE`` which arrays they have learned; those of ``PER_CLASS`` have a row per class, and get
    rows of zeros when new classes come. N samples, D features, C classes.

    Attributes:
        classes_: ``(C,)``, sorted; numbers or strings.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    PER_CLASS: ClassVar[tuple[str, ...]] = ()

    def fit(self: SomeHead, X: Any, y: Any) -> SomeHead:
        """Learns from features ``(N, D)`` and classes ``(N,)``, and forgets what was learned before."""
        for name in ("classes_", *self.STATE):
            self.__dict__.pop(name, None)
        return self.partial_fit(X, y)

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores ``(N, C)``: the highest is the prediction."""
        raise NotImplementedError

    def predict(self, X: Any) -> np.ndarray:
        """The class of each sample ``(N,)``."""
        scores_NC = self.decision_function(X)
        return self.classes_[scores_NC.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(N, C)``: the softmax of the scores, where a head says nothing else."""
        return softmax(self.decision_function(X))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the head into ``folder`` as one file, beside whatever is there; an older head is replaced in one step.

        Raises:
            FuseError: the head is not fitted, or its classes are neither numbers nor strings.
        """
        from safetensors.numpy import save_file

        self._fitted()
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        said = {
            "head": type(self).__name__,
            "parameters": self.get_params(deep=False),
            "classes": self.classes_.tolist(),
        }
        try:
            text = json.dumps(said, sort_keys=True)
        except TypeError as error:
            raise FuseError(f"{type(self).__name__}: cannot be saved: {error}. Expected numbers and strings.") from None
        arrays = {name: np.ascontiguousarray(values) for name, values in self._state().items()}
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(descriptor)
        try:
            save_file(arrays, name, metadata={"head": text})
            os.replace(name, folder / FILE)
        except BaseException:
            os.unlink(name)
            raise
        return folder / FILE

    @classmethod
    def from_pretrained(cls: type[SomeHead], source: str | Path) -> SomeHead:
        """Reads a head from a folder or a Hub id. ``Head.from_pretrained`` gives whichever kind it is.

        Raises:
            CheckpointError: there is no head, it is damaged, or of another kind than ``cls``.
        """
        from safetensors import SafetensorError, safe_open

        from hf_fuse.checkpoint.reader import resolve

        file = resolve(str(source))[0] / FILE
        if not file.is_file():
            raise CheckpointError(f"{source}: holds no {FILE}. Expected a folder that a head was saved to.")
        try:
            with safe_open(file, "numpy") as opened:
                said = json.loads((opened.metadata() or {})["head"])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: is no head or is damaged ({error}). Save it again.") from None
        name = said["head"]
        # A file must not choose what is imported.
        kind = getattr(import_module(f"hf_fuse.heads.{HEADS[name]}"), name) if name in HEADS else None
        if kind is None or not issubclass(kind, cls):
            raise CheckpointError(f"{file}: holds a {name}, expected a {cls.__name__}.")
        try:
            head = kind(**said["parameters"])
            head.classes_ = np.array(said["classes"])
            head._restore(arrays)
        except (TypeError, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: does not fit a {name} of this version ({error}). Save it again.") from None
        return head

    def _state(self) -> dict[str, np.ndarray]:
        """What has been learned."""
        return {name: np.asarray(getattr(self, name)) for name in self.STATE}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes back what ``_state`` gave."""
        for name in self.STATE:
            setattr(self, name, arrays[name])

    def _fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise NotFittedError(f"{type(self).__name__} has not learned anything yet. Call fit first.")

    def _features(self, X: Any) -> np.ndarray:
        """Features to predict from, ``(N, D)``, fp64."""
        self._fitted()
        return features(X)

    def _learned(self, y: Any, count: int) -> np.ndarray:
        """The number of each sample's class ``(N,)``, after room was made for classes not seen before."""
        y = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
        if y.shape != (count,):
            raise FuseError(f"y has the shape {y.shape}; expected one class for each of the {count} samples.")
        before = getattr(self, "classes_", y[:0])
        if before.dtype.kind != y.dtype.kind and len(before) and {before.dtype.kind, y.dtype.kind} & set("US"):
            raise FuseError("y: some classes are strings and others numbers. Name them alike.")
        classes = np.union1d(before, y)
        if len(classes) > len(before):
            places = np.searchsorted(classes, before)
            for name in self.PER_CLASS:
                if hasattr(self, name):
                    old = getattr(self, name)
                    new = np.zeros((len(classes), *old.shape[1:]), old.dtype)
                    new[places] = old
                    setattr(self, name, new)
            self.classes_ = classes
        return np.searchsorted(self.classes_, y)


def features(X: Any, dimensions: int = 2) -> np.ndarray:
    """``X`` as finite fp64 numbers; tensors of any device and dtype are taken too.

    Raises:
        FuseError: another number of dimensions, no samples, or numbers that are not finite.
    """
    X = X.detach().cpu().double().numpy() if hasattr(X, "detach") else np.asarray(X, dtype=np.float64)
    if X.ndim != dimensions or not len(X):
        raise FuseError(f"X has the shape {X.shape}; expected {dimensions} dimensions and at least one sample.")
    if not np.isfinite(X).all():
        raise FuseError("X holds numbers that are not finite. Look at the features.")
    return X


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
