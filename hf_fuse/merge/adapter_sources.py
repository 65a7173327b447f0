"""Where the numbers of an adapter come from when it is merged for itself, without the weights below it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_fuse.checkpoint.adapter import BoundAdapter
from hf_fuse.checkpoint.reader import TensorInfo
from hf_fuse.merge.sources import AdapterSource, Buffers, FileSource, read_numbers


class AdapterChanges(AdapterSource):
    """One adapter: its changes, and the tensors that it (or else the base) stores whole."""

    def __init__(self, bound: BoundAdapter, changes: Mapping[str, TensorInfo], whole: Mapping[str, TensorInfo]):
        self.checkpoint, self.bound, self.changes = bound.base, bound, changes
        self.tensors = {**changes, **whole}

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        if name in self.changes:
            self.read_delta(name, start, out, buffers)
        else:
            read_numbers(self.tensors[name], start, out, buffers)

    def delta_from(self, base: object, name: str) -> bool:
        return name in self.changes


class BaseOfChanges(FileSource):
    """The base. Only what a method looks at is read: of a changed tensor usually nothing."""

    def __init__(self, tensors: Mapping[str, TensorInfo], unread: Mapping[str, TensorInfo]):
        self.tensors, self.unread = {**unread, **tensors}, unread

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        if name in self.unread:
            out.zero_()
        else:
            super().read(name, start, out, buffers)
