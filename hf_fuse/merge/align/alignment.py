"""What an alignment method finds, and the way of its result to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_fuse.checkpoint.reader import TORCH_NAMES, Checkpoint, FilePool, read_header
from hf_fuse.checkpoint.writer import Layout, PartialFolder, lay_out
from hf_fuse.errors import FuseError
from hf_fuse.merge.align.maps import carried, raw_bytes, read_raw
from hf_fuse.merge.align.spaces import Spaces

# Not beside the weights: some programs read every file of tensors that they find there.
MAPS = "alignment/maps.safetensors"
MARK = {"hf_fuse": "alignment"}


@dataclass(frozen=True)
class Matched:
    """One group: how many of its units changed places, and how well it fits the reference before and after."""

    group: str
    units: int
    moved: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Fused:
    """A merged checkpoint instead of the aligned model.

    Attributes:
        make: name of a tensor -> its values, fp32.
        shapes: of tensors that are not those of the reference.
        config: keys of ``config.json`` that are not those of the reference.
    """

    make: Callable[[str], Tensor]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alignment:
    """What a method found.

    Attributes:
        maps: by space, see :mod:`hf_fuse.merge.align.maps`.
        measure: what ``before`` and ``after`` of the groups are.
        groups: of the reference.
        fused: None: the model itself is written, its units in order.
        difference: of logits where the method itself has compared them.
        facts: other figures.
    """

    maps: Mapping[str, Tensor]
    measure: str
    groups: Sequence[Matched]
    fused: Fused | None = None
    difference: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_aligned(
    checkpoint: Checkpoint, spaces: Spaces, alignment: Alignment, partial: PartialFolder, max_shard_bytes: int
) -> None:
    """Creates ``partial`` with the model's own tensors in their new order, bit for bit, one at a time."""
    rows = [(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()]
    pool = FilePool()
    layout = _created(rows, alignment, partial, max_shard_bytes)
    try:
        for name, info in checkpoint.tensors.items():
            values = carried(read_raw(info, pool), spaces.axes[name], alignment.maps)
            partial.write(layout.places[name], 0, raw_bytes(values.contiguous()))
    finally:
        pool.close()


def write_fused(reference: Checkpoint, alignment: Alignment, partial: PartialFolder, max_shard_bytes: int) -> None:
    """Creates ``partial`` with the merged tensors, in the dtypes of the reference, one at a time.

    Raises:
        FuseError: a tensor is not finite.
    """
    fused = alignment.fused
    infos = reference.tensors
    rows = [(name, info.dtype, fused.shapes.get(name, info.shape)) for name, info in infos.items()]
    layout = _created(rows, alignment, partial, max_shard_bytes)
    for name, info in infos.items():
        values = fused.make(name)
        if not values.isfinite().all():
            raise FuseError(f"{name}: the merged values are not finite, so nothing is saved.")
        stored = values.to(getattr(torch, TORCH_NAMES[info.dtype])).contiguous()
        partial.write(layout.places[name], 0, raw_bytes(stored))


def _created(rows: list, alignment: Alignment, partial: PartialFolder, max_shard_bytes: int) -> Layout:
    """The folder with the headers of all weights, and the whole file of maps."""
    layout = lay_out(rows, max_shard_bytes)
    partial.create(layout)
    path = partial.folder / MAPS
    path.parent.mkdir()
    save_file({name: units.contiguous() for name, units in alignment.maps.items()}, path, metadata=MARK)
    return layout


def read_maps(ref: str) -> dict[str, Tensor]:
    """The maps beside an aligned model.

    Raises:
        FuseError: there are none.
    """
    path = Path(ref).expanduser()
    path = path / MAPS if path.is_dir() else path
    if not path.is_file():
        raise FuseError(f"{ref}: no recorded alignment found. Expected a folder made by hf-fuse align.")
    if read_header(path)[1].get("hf_fuse") != MARK["hf_fuse"]:
        raise FuseError(f"{path}: is not a recorded alignment. Expected {MAPS} in a folder made by hf-fuse align.")
    return load_file(path)
