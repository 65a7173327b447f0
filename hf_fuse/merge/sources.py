"""Where the numbers of one model come from: files, files plus a LoRA adapter, realigned embeddings, or memory.

All kinds answer the same question: elements ``[start, stop)`` of a tensor, flattened, in the working precision.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import DTYPE_BYTES, DTYPE_CODES, TORCH_NAMES, Checkpoint, FilePool, TensorInfo

if TYPE_CHECKING:
    from hf_fuse.checkpoint.vocabulary import Alignment

# Elements that are measured, drawn and summed together. Fixed: results must not depend on how much is read at a time.
BLOCK = 1 << 18


class Buffers:
    """One worker's memory, reused for every block: raw bytes (pinned for CUDA), the block ``[K, n]``, and the base."""

    def __init__(self, device: torch.device, dtype: torch.dtype, pool: FilePool):
        self.device, self.dtype, self.pool = device, dtype, pool
        self._memory: dict[str, Tensor] = {}

    def bytes(self, count: int, slot: str = "raw") -> Tensor:
        """``uint8 [count]`` on the CPU, pinned if the work is done on a GPU."""
        held = self._memory.get(slot)
        if held is None or held.numel() < count:
            held = torch.empty(count, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self._memory[slot] = held
        return held[:count]

    def numbers(self, slot: str, *shape: int) -> Tensor:
        """Contiguous working-precision memory on the device."""
        count = 1
        for n in shape:
            count *= n
        held = self._memory.get(slot)
        if held is None or held.numel() < count:
            held = torch.empty(count, dtype=self.dtype, device=self.device)
            self._memory[slot] = held
        return held[:count].view(shape)

    def close(self) -> None:
        self._memory.clear()


def read_numbers(info: TensorInfo, start: int, out: Tensor, buffers: Buffers) -> None:
    """Fills 1-D ``out`` with elements of ``info`` from ``start`` on, converted."""
    dtype = getattr(torch, TORCH_NAMES[info.dtype])
    if dtype == out.dtype and out.is_cpu:
        buffers.pool.read(info, start, memoryview(out.numpy()).cast("B"))
        return
    raw = buffers.bytes(out.numel() * DTYPE_BYTES[info.dtype])
    buffers.pool.read(info, start, memoryview(raw.numpy()))
    # The pinned buffer is used again at once, so the copy to a GPU has to be finished; other workers overlap with it.
    out.copy_(raw.view(dtype))


class FileSource:
    """A checkpoint on disk."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        read_numbers(self.tensors[name], start, out, buffers)

    def delta_from(self, base: object, name: str) -> bool:
        """Whether :meth:`read_delta` knows the difference from ``base`` without subtracting."""
        return False

    def raw(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        """Unconverted bytes of elements from ``start`` on into a ``uint8`` tensor."""
        buffers.pool.read(self.tensors[name], start, memoryview(out.numpy()))


class AdapterSource(FileSource):
    """A checkpoint with a LoRA adapter on top. The dense delta exists one block at a time."""

    def __init__(self, checkpoint: Checkpoint, bound):
        super().__init__(checkpoint)
        self.bound = bound
        self.tensors = {**checkpoint.tensors, **bound.replaced}

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        super().read(name, start, out, buffers)
        if self.tensors[name].name in self.bound.low_rank:
            delta = buffers.numbers("lora", out.numel())
            self.read_delta(name, start, delta, buffers)
            out.add_(delta)

    def delta_from(self, base: object, name: str) -> bool:
        return (
            isinstance(base, FileSource) and base.checkpoint is self.checkpoint and type(base) is FileSource
        ) and self.tensors[name].name not in self.bound.replaced

    def read_delta(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        name = self.tensors[name].name  # a tied head is read under its embedding's name
        if name not in self.bound.low_rank:
            out.zero_()
        elif out.is_cpu:
            self.bound.delta(name, start, start + out.numel(), out)
        else:
            staged = torch.empty(out.shape, dtype=out.dtype)
            self.bound.delta(name, start, start + out.numel(), staged)
            out.copy_(staged)


class MemorySource:
    """A state dict."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        self.tensors = {
            name: TensorInfo(
                name, DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), Path(), 0
            )
            for name, tensor in self.state.items()
        }

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        out.copy_(self.state[self.tensors[name].name].view(-1)[start : start + out.numel()])

    def delta_from(self, base: object, name: str) -> bool:
        return False

    def raw(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        tensor = self.state[name].view(-1)
        count = out.numel() // tensor.element_size()
        out.copy_(tensor[start : start + count].view(torch.uint8))


class RealignedSource:
    """Another source seen through an output vocabulary: rows of its embeddings picked, or averaged over their owners.

    ``alignment.rows[key][i]`` is the source's row for output row i or -1; ``alignment.fill[i]`` then lists
    ``(model key, row)`` whose mean is taken. An empty list is zero for a token, for padding the mean of the rows with a
    token.
    """

    def __init__(self, plain: Mapping[str, FileSource], key: str, names: set[str], alignment: Alignment):
        self.plain, self.source, self.names = plain, plain[key], names
        self.rows, self.fill, self.has_token = alignment.rows[key], alignment.fill, alignment.has_token
        self._means: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, shape=(len(self.rows), *info.shape[1:])) if name in names else info
            for name, info in self.source.tensors.items()
        }

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        if name not in self.names:
            self.source.read(name, start, out, buffers)
            return
        width = self.tensors[name].numel // len(self.rows)
        position, stop = start, start + out.numel()
        while position < stop:
            row, column = divmod(position, width)
            own, last = int(self.rows[row]), row + 1
            if own >= 0:  # a run of rows that follow each other in the source is one read
                run = self.rows[row : -(-stop // width)]
                breaks = np.flatnonzero(np.diff(run) != 1)
                last = row + (int(breaks[0]) + 1 if len(breaks) else len(run))
            end = min(last * width, stop)
            piece = out[position - start : end - start]
            if own >= 0:
                self.source.read(name, own * width + column, piece, buffers)
            else:
                self._fill(name, row, column, width, piece, buffers)
            position = end

    def _fill(self, name: str, row: int, column: int, width: int, piece: Tensor, buffers: Buffers) -> None:
        owners = self.fill[row]
        if not owners and not self.has_token[row]:
            piece.copy_(self._mean_row(name, width, piece, buffers)[column : column + piece.numel()])
            return
        piece.zero_()
        one = torch.empty_like(piece)
        for key, theirs in owners:
            self.plain[key].read(name, theirs * width + column, one, buffers)
            piece.add_(one, alpha=1 / len(owners))

    def _mean_row(self, name: str, width: int, like: Tensor, buffers: Buffers) -> Tensor:
        """Mean of the output rows that have a token, ``fp64 [width]``."""
        with self._lock:
            if name not in self._means:
                total = torch.zeros(width, dtype=torch.float64, device=like.device)
                height = max(1, BLOCK // width)
                edges = np.flatnonzero(np.diff(self.has_token, prepend=False, append=False))
                for first, last in zip(edges[::2].tolist(), edges[1::2].tolist()):
                    for row in range(first, last, height):
                        block = like.new_empty(min(height, last - row) * width)
                        self.read(name, row * width, block, buffers)
                        total += block.view(-1, width).sum(0, dtype=torch.float64)
                self._means[name] = total / int(self.has_token.sum())
            return self._means[name]

    def delta_from(self, base: object, name: str) -> bool:
        if name in self.names:
            return False
        return self.source.delta_from(getattr(base, "source", base), name)

    def read_delta(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        self.source.read_delta(name, start, out, buffers)

    def raw(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        self.source.raw(name, start, out, buffers)
