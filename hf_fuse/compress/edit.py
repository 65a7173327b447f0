"""What a compression changes in a checkpoint, and the way to disk: everything else is copied byte for byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import DTYPE_BYTES, TORCH_NAMES, Checkpoint, FilePool, TensorInfo
from hf_fuse.checkpoint.writer import PartialFolder, lay_out
from hf_fuse.errors import FuseError
from hf_fuse.merge.parameters import layer_of, stacks

PIECE = 16 << 20  # bytes copied at a time

Read = Callable[[str], Tensor]  # name of a stored tensor -> its values in fp32


@dataclass
class Edit:
    """The difference between input and output.

    Attributes:
        layers: indices of the layers to keep, in order; None: all of them.
        tensors: stored name (numbered as in the input) -> new values, or a function that makes them from stored ones
            when their turn comes. The stored dtype is kept.
        shapes: of the values that such functions make, where they differ from the stored ones'.
        config: keys of ``config.json`` to set.
        files: name of a safetensors file to write beside the weights -> its tensors.
        expected: logits on the probe (:meth:`Subject.probe`), which the output has to reproduce; None: not checked.
        summary: what was done, in a sentence.
        facts: figures for the report.
        chart: draws what was measured into a file.
    """

    layers: list[int] | None = None
    tensors: dict[str, Tensor | Callable[[Read], Tensor]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    expected: Tensor | None = None
    summary: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    chart: Callable[[Path], object] | None = None


def the_stack(checkpoint: Checkpoint) -> tuple[str, int]:
    """Name and height of the only stack of layers, ``("model.layers", 32)``.

    Raises:
        FuseError: there are several (encoder and decoder, or a vision tower) or none.
    """
    found = stacks(checkpoint.tensors)
    if len(found) != 1:
        listed = ", ".join(sorted(found)) or "none"
        raise FuseError(f"{checkpoint.ref}: layers can be dropped where there is one stack of them. Found: {listed}.")
    return next(iter(found.items()))


def read_tensor(info: TensorInfo, pool: FilePool) -> Tensor:
    """A whole stored tensor in fp32."""
    values = torch.empty(info.shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
    pool.read(info, 0, memoryview(_bytes_of(values)))
    return values.float()


def write_weights(checkpoint: Checkpoint, edit: Edit, partial: PartialFolder, max_shard_bytes: int) -> int:
    """Creates ``partial`` with the edited weights, streaming. -> bytes written.

    At most one edited tensor, and what it is made from, is in memory at a time.
    """
    if unknown := sorted(set(edit.tensors) - set(checkpoint.tensors)):
        raise FuseError(f"{checkpoint.ref}: has no tensor {unknown[0]!r} to change.")
    names = output_names(checkpoint, edit.layers)
    shapes = {old: _new_shape(checkpoint.tensors[old], edit) for old in names}
    layout = lay_out(((new, checkpoint.tensors[old].dtype, shapes[old]) for old, new in names.items()), max_shard_bytes)
    partial.create(layout)
    pool = FilePool()

    def read(name: str) -> Tensor:
        return read_tensor(checkpoint.tensors[name], pool)

    try:
        for old, new in names.items():
            info, place = checkpoint.tensors[old], layout.places[new]
            made = edit.tensors.get(old)
            if made is None:
                _copy(info, pool, partial, place)
                continue
            values = made if isinstance(made, Tensor) else made(read)
            if tuple(values.shape) != place.shape:
                raise FuseError(f"{old}: the new values are {list(values.shape)}, expected {list(place.shape)}.")
            if not values.isfinite().all():
                raise FuseError(f"{old}: the new values are not finite, so nothing is saved.")
            stored = values.detach().cpu().to(getattr(torch, TORCH_NAMES[info.dtype])).contiguous()
            partial.write(place, 0, memoryview(_bytes_of(stored)))
    finally:
        pool.close()
    return layout.nbytes


def output_names(checkpoint: Checkpoint, layers: list[int] | None) -> dict[str, str]:
    """Stored name -> name in the output, layers renumbered; tensors of dropped layers are left out."""
    if layers is None:
        return {name: name for name in checkpoint.tensors}
    found = {}
    for name in checkpoint.tensors:
        layer = layer_of(name)
        if layer is None:
            found[name] = name
        elif layer[1] in layers:
            stack = re.escape(layer[0])
            found[name] = re.sub(rf"^{stack}\.\d+\.", f"{layer[0]}.{layers.index(layer[1])}.", name)
    return found


def _new_shape(info: TensorInfo, edit: Edit) -> tuple[int, ...]:
    made = edit.tensors.get(info.name)
    return tuple(made.shape) if isinstance(made, Tensor) else edit.shapes.get(info.name, info.shape)


def _bytes_of(values: Tensor) -> Any:
    return values.reshape(-1).view(torch.uint8).numpy()


def _copy(info: TensorInfo, pool: FilePool, partial: PartialFolder, place: Any) -> None:
    width = DTYPE_BYTES[info.dtype]
    count = PIECE // width
    for first in range(0, info.numel, count):
        piece = memoryview(bytearray(min(count, info.numel - first) * width))
        pool.read(info, first, piece)
        partial.write(place, first, piece)
