"""Writes a checkpoint folder: all or nothing, in any order, with nothing held in memory.

Names, shapes and dtypes are known before the first tensor is computed, so each file's header is written first and
tensor bytes go to their final offsets with ``pwrite``, from any thread or process. The folder grows as
``<output>.partial`` and appears under its name with one rename after everything is on disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hf_fuse.checkpoint.reader import DTYPE_BYTES
from hf_fuse.errors import OutputError


@dataclass(frozen=True)
class Place:
    """Where a tensor of the output goes: absolute byte offset in a file of the output folder."""

    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Layout:
    """All files of the output weights: headers ready to write, sizes, and each tensor's place."""

    headers: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    index: bytes | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values()) + len(self.index or b"")


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = DTYPE_BYTES[dtype]
    for n in shape:
        count *= n
    return count


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    max_shard_bytes: int,
    stem: str = "model",
    metadata: dict[str, str] | None = None,
) -> Layout:
    """Plans files for ``(name, dtype code, shape)`` in order; a shard is closed before it would exceed the limit.

    One shard is called ``<stem>.safetensors``; several get the standard names and an index. A tensor larger than the
    limit has a shard of its own. ``metadata`` goes into every header.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    used, total, parameters = 0, 0, 0
    for name, dtype, shape in tensors:
        size = _nbytes(dtype, shape)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, dtype, shape))
        used += size
        total += size
        parameters += size // DTYPE_BYTES[dtype]
    layout, weight_map = Layout(), {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        # Wide dtypes first: the format's own writer does so to keep every tensor aligned to its element size.
        for name, dtype, shape in sorted(shard, key=lambda entry: (-DTYPE_BYTES[entry[1]], entry[0])):
            size = _nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        layout.headers[file] = len(text).to_bytes(8, "little") + text
        begin = len(layout.headers[file])
        layout.sizes[file] = begin + position
        for name, dtype, shape in shard:
            start = begin + header[name]["data_offsets"][0]
            layout.places[name] = Place(file, start, dtype, shape)
            weight_map[name] = file
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total, "total_parameters": parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        layout.index = (json.dumps(index, indent=2) + "\n").encode()
    return layout


class PartialFolder:
    """The output while it is being made. Writes go to ``<output>.partial``; :meth:`publish` makes it the output."""

    def __init__(self, output: Path):
        self.output = output
        self.folder, _ = leftovers(output)
        self._open: dict[str, int] = {}

    def create(self, layout: Layout) -> None:
        """Makes the folder and the weight files at their full size, headers written."""
        self.folder.mkdir()
        for file, header in layout.headers.items():
            with (self.folder / file).open("wb") as handle:
                handle.write(header)
                # Not reserved: the plan has checked the free space, and filling blocks twice would cost a third of the
                # whole merge on some file systems.
                handle.truncate(layout.sizes[file])
        if layout.index:
            (self.folder / "model.safetensors.index.json").write_bytes(layout.index)

    def write(self, place: Place, first: int, buffer: memoryview) -> None:
        """Writes bytes of a tensor from element ``first`` on. Safe from any thread."""
        handle = self._open.get(place.file)
        if handle is None:
            fresh = os.open(self.folder / place.file, os.O_WRONLY)
            handle = self._open.setdefault(place.file, fresh)
            if handle != fresh:
                os.close(fresh)
        offset, done = place.start + first * DTYPE_BYTES[place.dtype], 0
        try:
            while done < len(buffer):
                done += os.pwrite(handle, buffer[done:], offset + done)
        except OSError as error:
            raise OutputError(
                f"{self.folder / place.file}: cannot be written ({error.strerror}). The old output, if any, is intact."
            ) from None

    def sync(self) -> None:
        """Forces the weight files that this process wrote to disk."""
        for handle in self._open.values():
            os.fsync(handle)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def publish(self) -> None:
        """Everything to disk, then one rename. An existing output is exchanged for the new one in one step."""
        self.close()
        for path in self.folder.rglob("*"):
            _fsync(path)
        _fsync(self.folder)
        if not self.output.exists():
            self.folder.rename(self.output)
        else:
            _exchange(self.folder, self.output)
            # The new output is in place: an old one that can't be removed is left to the next run, with the lock file.
            with contextlib.suppress(OSError):
                remove_tree(self.folder)
        with contextlib.suppress(OSError):
            _fsync(self.output.parent)

    def discard(self) -> None:
        self.close()
        remove_tree(self.folder)


def remove_tree(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders. In one step where the kernel can (Linux ``renameat2``); else in two, of which the next run
    finishes the second (see :func:`exclusive_output`)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        at_cwd, exchange = -100, 2
        if renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
            return
    _, aside = leftovers(old)
    old.rename(aside)
    new.rename(old)
    remove_tree(aside)


@contextlib.contextmanager
def exclusive_output(
    output: Path, *, overwrite: bool = False, keep: Callable[[Path], bool] = lambda folder: False
) -> Iterator[PartialFolder]:
    """Holds the lock on ``output`` and yields its partial folder, which is removed if the block fails.

    Leftovers of a killed run are recognised by its lock file, which nobody holds any more, and removed; an old output
    that such a run had moved aside is put back. A partial folder that ``keep`` says yes to is not removed, neither on
    failure nor by the next run: there is something in it to go on from.

    Raises:
        OutputError: the output exists and ``overwrite`` is off, another run is writing it, something that no run left
            is in the way, or the disk refuses.
    """
    output = Path(output).expanduser().absolute()
    check_output(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock, killed = _lock(output)
    except OSError as error:
        raise OutputError(f"{output.parent}: cannot be written ({error.strerror}). Choose another output.") from None
    partial = PartialFolder(output)
    ours = killed
    try:
        _clear_leftovers(output, killed, keep)
        ours = True
        check_output(output, overwrite)  # again: another run may have finished while the lock was awaited
        try:
            yield partial
        except BaseException:
            if not keep(partial.folder):
                partial.discard()
            raise
    except OSError as error:
        where, why = error.filename or output, error.strerror or error
        raise OutputError(f"{where}: cannot be written ({why}). The old output, if any, is intact.") from error
    finally:
        partial.close()
        # Unlinked before it is released, so that nobody else can be holding a lock on the vanishing name. It stays if
        # something could not be removed: that is how the next run knows it for ours.
        if not (ours and any(path.exists() for path in leftovers(output))):
            _lock_path(output).unlink(missing_ok=True)
        os.close(lock)


def leftovers(output: Path) -> tuple[Path, Path]:
    """What a killed run can leave beside its output: the unfinished one, and an old one moved aside."""
    return output.with_name(output.name + ".partial"), output.with_name(output.name + ".replaced")


def _clear_leftovers(output: Path, killed: bool, keep: Callable[[Path], bool]) -> None:
    partial, aside = leftovers(output)
    if not killed:
        for path in (partial, aside):
            if path.exists() or path.is_symlink():
                raise OutputError(
                    f"{path}: exists, and no run of hf_fuse left it. Remove it, or choose another output."
                )
    if aside.exists() and not output.exists():
        aside.rename(output)
    remove_tree(aside)
    if not keep(partial):
        remove_tree(partial)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses an output that exists. ``overwrite`` replaces only what looks like a model folder or is empty."""
    if output.name in ("", ".."):
        raise OutputError(f"{output}: is not the name of a folder to make. Choose another output.")
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise OutputError(f"{output}: exists and is not a folder. Choose another output.")
    if not overwrite:
        raise OutputError(f"{output}: exists. Choose another output, or replace it with --overwrite.")
    names = [path.name for path in output.iterdir()]
    # A config.json alone is no sign: many kinds of project have one.
    if names and not any(name == "fuse_recipe.yaml" or name.endswith((".safetensors", ".bin")) for name in names):
        raise OutputError(
            f"{output}: does not look like a model folder (it holds {', '.join(sorted(names)[:3])} and no weights), so "
            "it is not replaced. Choose another output."
        )


def _lock_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _lock(output: Path) -> tuple[int, bool]:
    """The locked file, and whether an earlier holder was killed: whoever ends in order removes the file."""
    path = _lock_path(output)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            raise OutputError(
                f"{output}: another run (process {pid or 'unknown'}) is writing it. Wait for it, or choose another "
                "output."
            ) from None
        # The previous holder may have unlinked the file between our open and our lock: then we locked a dead name.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                killed = os.fstat(handle).st_size > 0
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle, killed
        os.close(handle)
