"""Weights pickled by torch (``pytorch_model.bin``), read without executing anything and without copying them.

Unpickling can run code, so this is reached only by ``--allow-pickle``, and torch's restricted unpickler is used, which
knows tensors and plain containers alone. The archives that torch has written since 1.6 hold every tensor's bytes as
they are, so a tensor becomes a place in that file. Older files, and tensors that are views with strides, are written
out once to a temporary folder, one file at a time.
"""

from __future__ import annotations

import re
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fuse.checkpoint.reader import DTYPE_CODES, REDOWNLOAD, TensorInfo, checked_index
from hf_fuse.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LOCAL_HEADER = 30  # fixed bytes of a zip entry's own header, before its name and extra field
_scratch: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def convert_pickled(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder with ``pytorch_model.bin`` or its shards, readable like one of a safetensors file.

    Raises:
        CheckpointError: no such files, both kinds, missing shards, index and files that disagree, an index that leaves
            its folder, damaged files, or a pickle that asks for anything but tensors.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise CheckpointError(
            f"{folder}: holds both {SINGLE} and an index of shards; which is current cannot be known. Delete the stale "
            "one."
        )
    if single.exists():
        return pickled_tensors(single)
    if not index.exists():
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX} found. {REDOWNLOAD}")
    weight_map = checked_index(index, ".bin")
    missing = sorted({file for file in weight_map.values() if not (folder / file).exists()})
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} missing shard(s): {', '.join(missing)}. {REDOWNLOAD}")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        for name, info in pickled_tensors(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{folder / file}: holds tensor {name!r}, which the index lists in "
                    f"{weight_map.get(name, 'nowhere')}: index and files disagree. {REDOWNLOAD}"
                )
            tensors[name] = info
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{index}: lists {len(lost)} tensor(s) that no shard holds, first {lost[0]!r}. {REDOWNLOAD}"
        )
    return tensors


def pickled_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one pickled state dict. Nothing but tensors is accepted, and nothing in the file is executed."""
    import torch

    places = _stored_bytes(path)
    state = _load(path, mapped=places is not None)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a filled dictionary of tensors.")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}, expected a dictionary of tensors by name. "
                "Extract the model's state dict from it and save that."
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or not _code(tensor):
            raise CheckpointError(
                f"{path}: tensor {name!r} is {tensor.dtype} ({tensor.layout}), which is not supported. Convert it to "
                "dense numbers."
            )
    origin = _origin(state, places) if places else None
    copied = _copied(path, {n: t for n, t in state.items() if t.numel() and (origin is None or not _in_order(t))})
    return {
        name: copied.get(name)
        or TensorInfo(
            name, _code(tensor), tuple(tensor.shape), path, tensor.data_ptr() - origin if tensor.numel() else 0
        )
        for name, tensor in state.items()
    }


def _load(path: Path, mapped: bool) -> object:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and (wanted or "reduce for unrecognized" in str(error)):
            raise CheckpointError(
                f"{path}: refused, and nothing in it was executed: the pickle asks for "
                f"{wanted[1] if wanted else 'a function'}, while weights need plain tensors alone. Do not load this "
                "file by other means unless you know who made it."
            ) from None
        # The unpickler's own words follow a page of advice on how to load the file all the same.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0][:200]
        reason = type(error).__name__ if "weights_only" in reason else reason
        raise CheckpointError(f"{path}: not a readable torch file ({reason}). {REDOWNLOAD}") from None


def _stored_bytes(path: Path) -> dict[int, int] | None:
    """``{offset: size}`` of the archive's entries; None if the bytes in ``path`` are not the tensors' as they are."""
    places, order = {}, "little"
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return None
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise CheckpointError(
                            f"{path}: its entry {entry.filename!r} is compressed, which torch never does. Save the "
                            "model again with torch.save or save_pretrained."
                        )
                    if entry.filename.endswith("/byteorder") and entry.file_size < 16:
                        order = archive.read(entry).decode("ascii", "replace")
                    file.seek(entry.header_offset + LOCAL_HEADER - 4)
                    start = entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))
                    places[start] = entry.file_size
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, UnicodeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}). {REDOWNLOAD}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    return places if order == sys.byteorder else None


def _origin(state: dict[str, torch.Tensor], places: dict[int, int]) -> int | None:
    """The address at which the file was mapped: the one that puts every storage on an entry of its size.

    torch tells where a mapped storage lies in memory, but not where in the file.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values() if t.numel()}
    if not storages:
        return 0
    first = min(storages)
    origins = [
        first - start
        for start in places
        if all(places.get(address - first + start) == size for address, size in storages.items())
    ]
    return origins[0] if len(origins) == 1 else None


def _in_order(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _code(tensor: torch.Tensor) -> str | None:
    return DTYPE_CODES.get(str(tensor.dtype).removeprefix("torch."))


def _copied(path: Path, state: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Writes tensors to a scratch file, views of the same numbers once."""
    import torch

    if not state:
        return {}
    folder = tempfile.TemporaryDirectory(prefix="hf_fuse_pickle_")
    _scratch.append(folder)
    target = Path(folder.name) / "tensors"
    written: dict[tuple, int] = {}
    tensors = {}
    try:
        with target.open("wb") as file:
            for name, tensor in state.items():
                view = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
                if view not in written:
                    written[view] = file.tell()
                    numbers = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
                    file.write(memoryview(numbers.view(torch.uint8).numpy()))
                tensors[name] = TensorInfo(name, _code(tensor), tuple(tensor.shape), target, written[view])
    except OSError as error:
        raise CheckpointError(
            f"{path}: its tensors could not be written to {folder.name} ({error.strerror or error}). Make room there, "
            "or set TMPDIR to a folder on another disk."
        ) from None
    return tensors
