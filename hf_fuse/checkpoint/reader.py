"""Reads checkpoints: headers at once and distrustfully, tensor bytes lazily and in pieces.

A checkpoint is a folder with ``config.json`` and safetensors (one file, or shards with an index). Opening one reads
headers only and imports no torch. Bytes are read with ``preadv`` into buffers that the caller reuses: on warm files
this is up to twice as fast as page-faulting a memory map, and a file that shrinks under a running merge is an error
message instead of a SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hf_fuse.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_INDEX_BYTES = 50_000_000
MAX_AXES = 64  # of a tensor, as in torch

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPE_CODES = {name: code for code, name in TORCH_NAMES.items()}
REDOWNLOAD = "Download it again, or run `hf cache verify` if it came from the Hub."


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. ``dtype`` is the safetensors code (``"BF16"``), ``start`` the absolute byte offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks one safetensors header: ``({tensor name: TensorInfo}, metadata)``.

    Refused, each with the file's name: truncated or longer files, headers over 100 MB, names that appear twice,
    overlapping or missing bytes, unknown dtypes, sizes that disagree with shapes.
    """

    def bad(reason: str, fix: str = REDOWNLOAD) -> CheckpointError:
        return CheckpointError(f"{path}: {reason}. {fix}")

    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise bad("is not a regular file")
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise bad(f"only {size} bytes long, not a safetensors file")
            length = int.from_bytes(first, "little")
            if length > MAX_HEADER_BYTES:
                raise bad(f"header claims {length} bytes, more than the format's limit of {MAX_HEADER_BYTES}")
            if length > size - 8:
                raise bad(f"truncated: the header needs {length + 8} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
    except _RepeatedNameError as error:
        raise bad(f"{str(error)!r} appears twice in the header") from None
    except (ValueError, RecursionError):
        raise bad("the header is not valid JSON") from None
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise bad("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("the header's __metadata__ is not a JSON object of strings")

    begin = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (lo, hi) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, lo, hi)
            kinds = type(entry["shape"]) is list and type(dtype) is str and len(shape) <= MAX_AXES
            if not kinds or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                raise ValueError
            name.encode()  # JSON can spell half a character, which no file can hold
        except (KeyError, TypeError, ValueError):
            raise bad(f"the header entry of tensor {name!r} is malformed") from None
        if dtype not in DTYPE_BYTES:
            raise bad(f"tensor {name!r} has dtype {dtype!r}, which is not supported", "Convert it to a known dtype.")
        info = TensorInfo(name, dtype, shape, path, begin + lo)
        if hi - lo != info.nbytes:
            raise bad(f"tensor {name!r} has {hi - lo} bytes, but {dtype} {list(shape)} needs {info.nbytes}")
        tensors[name] = info
        spans.append((lo, hi, name))
    position = 0
    for lo, hi, name in sorted(spans):
        if lo != position:
            raise bad(f"tensor {name!r} starts at byte {lo}, expected {position}: bytes overlap or are missing")
        position = hi
    if begin + position != size:
        kind = "truncated" if size < begin + position else "has trailing bytes"
        raise bad(f"{kind}: the header describes {begin + position} bytes, the file has {size}")
    return tensors, metadata


class _RepeatedNameError(ValueError):
    pass


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Of two equal names, JSON readers keep either; what a file holds must not depend on the reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedNameError(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return found


def checked_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Reads an index of shards: ``{tensor name: file name}``, file names confined to the folder."""
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, more than an index may have ({MAX_INDEX_BYTES}).")
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not an index: expected JSON with a 'weight_map' object. {REDOWNLOAD}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' is not a filled JSON object. {REDOWNLOAD}")
    for name, file in weight_map.items():
        inside = isinstance(file, str) and re.fullmatch(r"[^/\\:]{1,255}", file) and file.endswith(suffix)
        inside = inside and not file.startswith("..") and file.isprintable()
        if not inside:
            raise CheckpointError(
                f"{path}: tensor {name!r} points to {file!r}. Expected the name of a {suffix} file in the same "
                "folder; an index that leaves its folder is not trusted."
            )
    return weight_map


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON. {REDOWNLOAD}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object.")
    return value


def text_part(config: dict) -> dict:
    """Where a config describes the language model: a part of it in models that see or hear, else all of it."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


@dataclass
class Checkpoint:
    """One model on disk. ``ref`` is what the user wrote; ``repo_id`` and ``commit`` are set if it came from the Hub."""

    ref: str
    folder: Path
    tensors: dict[str, TensorInfo]
    repo_id: str | None = None
    commit: str | None = None

    @cached_property
    def config(self) -> dict:
        path = self.folder / "config.json"
        return read_json(path) if path.exists() else {}

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures")
        name = names[0] if isinstance(names, list) and names else self.config.get("model_type")
        return name if isinstance(name, str) else None

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def header_sha256(self) -> str:
        """Hash of names, dtypes, shapes and file sizes: tells two layouts apart without reading the weights."""
        rows = sorted((t.name, t.dtype, t.shape, t.file.name, t.start) for t in self.tensors.values())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @cached_property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def sha256(self) -> dict[str, str]:
        """Content hash of every weight file, by file name (reads all bytes)."""
        return {path.name: file_sha256(path) for path in self.files}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_checkpoint(ref: str, revision: str | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens a local folder or a Hub id (``org/name``, ``hf://org/name``), reading headers only.

    A Hub id is downloaded with ``snapshot_download`` and pinned to the commit that was found.

    Raises:
        CheckpointError: no such folder or repository, missing shards (all are listed), damaged or disagreeing files,
            or pickled weights without ``allow_pickle``.
    """
    folder, repo_id, commit = resolve(ref, revision, allow_pickle=allow_pickle)
    return Checkpoint(ref, folder, _weights(folder, allow_pickle), repo_id=repo_id, commit=commit)


def resolve(
    ref: str, revision: str | None = None, *, allow_pickle: bool = False
) -> tuple[Path, str | None, str | None]:
    """``ref`` -> (local folder, Hub id or None, commit or None). Downloads when ``ref`` is not a local folder."""
    path = Path(ref.removeprefix("hf://")).expanduser()
    if not ref.startswith("hf://") and path.is_dir():
        if revision:
            raise CheckpointError(f"{ref}: is a local folder, so revision {revision!r} has no meaning. Remove it.")
        return path.resolve(), None, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", ref.removeprefix("hf://")):
        raise CheckpointError(f"{ref}: no such folder, and not a Hub id (expected org/name).")
    from hf_fuse.hub import fetch_snapshot

    repo_id = ref.removeprefix("hf://")
    folder, commit = fetch_snapshot(repo_id, revision, allow_pickle=allow_pickle)
    return folder, repo_id, commit


def _weights(folder: Path, allow_pickle: bool) -> dict[str, TensorInfo]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists() and single.exists() and set(checked_index(index).values()) != {single.name}:
        raise CheckpointError(
            f"{folder}: holds both model.safetensors and an index of shards; which is current cannot be known. Delete "
            "the stale one."
        )
    if index.exists():
        return _sharded(folder, index)
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").exists() and not single.exists():
        raise CheckpointError(
            f"{folder}: is an adapter, not a full model. Name the model it was trained on as base_model in the recipe."
        )
    if len(files) == 1:
        return read_header(files[0])[0]
    if files:
        raise CheckpointError(
            f"{folder}: several .safetensors files but no model.safetensors.index.json, so it is not known which "
            f"belong to the model. {REDOWNLOAD}"
        )
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not allow_pickle:
        raise CheckpointError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when loaded. Convert it to "
            "safetensors, or pass --allow-pickle to load it with torch's restricted unpickler."
        )
    if pickles:
        from hf_fuse.checkpoint.pickled import convert_pickled

        return convert_pickled(folder)
    raise CheckpointError(f"{folder}: no model.safetensors or index found. Expected a folder saved by save_pretrained.")


def _sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = checked_index(index)
    missing = sorted({file for file in weight_map.values() if not (folder / file).exists()})
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} missing shard(s): {', '.join(missing)}. {REDOWNLOAD}")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        for name, info in read_header(folder / file)[0].items():
            if weight_map.get(name) != file:
                listed = weight_map.get(name, "nowhere")
                raise CheckpointError(
                    f"{folder / file}: holds tensor {name!r}, which the index lists in {listed}: index and files "
                    f"disagree. {REDOWNLOAD}"
                )
            tensors[name] = info
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{index}: lists {len(lost)} tensor(s) that no shard holds, first {lost[0]!r}. {REDOWNLOAD}"
        )
    return tensors


class FilePool:
    """Open file descriptors by path. ``pread`` needs no seek, so all threads share one descriptor per file."""

    def __init__(self):
        self._open: dict[Path, int] = {}

    def read(self, info: TensorInfo, first: int, buffer: memoryview) -> None:
        """Fills ``buffer`` with the bytes of ``info`` from element ``first`` on."""
        offset, done = info.start + first * DTYPE_BYTES[info.dtype], 0
        try:
            handle = self._open.get(info.file)
            if handle is None:
                # setdefault keeps one descriptor when two threads race; the loser closes its own.
                fresh = os.open(info.file, os.O_RDONLY)
                handle = self._open.setdefault(info.file, fresh)
                if handle != fresh:
                    os.close(fresh)
            while done < len(buffer):
                count = os.preadv(handle, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{info.file}: became shorter while it was read (tensor {info.name!r}).")
                done += count
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error.strerror or error}).") from None

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
