"""One file on disk per head."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.heads import HEADS

try:
    from sklearn.base import BaseEstimator
    from sklearn.utils.validation import check_is_fitted
except ImportError:
    raise FuseError('heads need scikit-learn, which is not installed. Run: pip install "hf-fuse[heads]"') from None

FILE = "head.safetensors"
Some = TypeVar("Some", bound="SavedEstimator")


class SavedEstimator(BaseEstimator):
    """An estimator of scikit-learn that is saved with its parameters and what it has learned.

    Subclasses say in ``STATE`` which arrays they have learned, and in ``LEARNED`` which numbers and lists.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    LEARNED: ClassVar[tuple[str, ...]] = ("n_features_in_",)

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
            "parameters": self._parameters(),
            "learned": {name: getattr(self, name) for name in self.LEARNED},
        }
        try:
            text = json.dumps(said, sort_keys=True, default=_plain)
        except TypeError as error:
            raise FuseError(f"{type(self).__name__}: cannot be saved: {error}. Expected numbers and strings.") from None
        arrays = {name: np.ascontiguousarray(values) for name, values in self._state().items()}
        new = folder / f"{FILE}.partial"
        save_file(arrays, new, metadata={"head": text})
        os.replace(new, folder / FILE)
        return folder / FILE

    @classmethod
    def from_pretrained(cls: type[Some], source: str | Path) -> Some:
        """Reads a head from a folder or a Hub id. ``Head.from_pretrained`` gives whichever classifier it is.

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
            name, parameters, learned = str(said["head"]), said["parameters"], said["learned"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: is no head or is damaged ({error}). Save it again.") from None
        # A file must not choose what is imported.
        kind = getattr(import_module(f"hf_fuse.heads.{HEADS[name]}"), name) if name in HEADS else None
        if kind is None or not issubclass(kind, cls):
            raise CheckpointError(f"{file}: holds a {name}, expected a {cls.__name__}.")
        try:
            head = kind(**parameters)
            for attribute in kind.LEARNED:
                value = learned[attribute]
                setattr(head, attribute, np.array(value) if isinstance(value, list) else value)
            head._restore(arrays)
        except (TypeError, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: does not fit a {name} of this version ({error}). Save it again.") from None
        return head

    def _parameters(self) -> dict[str, Any]:
        """Those that are saved."""
        return self.get_params(deep=False)

    def _state(self) -> dict[str, np.ndarray]:
        """What has been learned."""
        return {name: np.asarray(getattr(self, name)) for name in self.STATE}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes back what ``_state`` gave."""
        for name in self.STATE:
            setattr(self, name, arrays[name])

    def _fitted(self) -> None:
        check_is_fitted(self, [*self.LEARNED, *self.STATE])

    def _forget(self) -> None:
        for name in (*self.LEARNED, *self.STATE):
            self.__dict__.pop(name, None)


def _plain(value: Any) -> Any:
    """What a search over parameters leaves in them: numbers and arrays of numpy."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not written")
