"""Who does the work: threads of one process, and ranks of a launched group. Neither changes the result."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch

from hf_fuse.checkpoint.reader import FilePool
from hf_fuse.errors import FuseError
from hf_fuse.merge.sources import Buffers
from hf_fuse.merge.units import MERGE, Unit
from hf_fuse.registry import Method

Job = TypeVar("Job")
MAX_WORKERS = 8  # beyond, the disk or the memory bus is what one waits for


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def allow_open_files(count: int) -> None:
    """Lifts this process's limit on open files, as far as it may be lifted, if ``count`` would not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _granularity(method: Method, unit: Unit) -> str:
    decide = getattr(method.module, "unit", None)
    if unit.action != MERGE:
        return "element"
    if decide is None:
        return getattr(method.module, "UNIT", "element")
    return decide(**{name: unit.options[name] for name in _parameters(decide)})


@cache
def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def needs_whole_tensor(method: Method, unit: Unit) -> bool:
    """Whether the method must see this tensor (of a stack of matrices, each) in one piece instead of blocks."""
    return _granularity(method, unit) == "tensor"


def row_length(method: Method, unit: Unit) -> int | None:
    """Elements in a row, if the method must see whole rows; else None."""
    if _granularity(method, unit) != "rows":
        return None
    if unit.matrix != unit.shape:
        return unit.shape[-1]
    rows = unit.shape[0] if len(unit.shape) > 1 else 1
    return max(unit.numel // max(rows, 1), 1)


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of giving them back to the kernel and faulting them in again for every
    block of numbers, which would cost more than the arithmetic. Other C libraries do without."""
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 64 << 20)
        libc.mallopt(mmap_threshold, 32 << 20)


class Workers:
    """A group of threads with a :class:`Buffers` each. torch works single-threaded inside each of them: how torch
    splits an operation among its own threads would otherwise leak into the last bit."""

    def __init__(self, device: torch.device, dtype: torch.dtype, count: int | None = None):
        _keep_freed_memory()
        self.count = count or default_workers()
        self._pool = FilePool()  # one for all: models come in hundreds of shards, and open files are limited
        self._buffers = [Buffers(device, dtype, self._pool) for _ in range(self.count)]

    def run(self, jobs: Iterable[Job], work: Callable[[Job, Buffers, int], None]) -> None:
        """Calls ``work(job, buffers, worker number)`` for every job; the first error stops all and is raised."""
        queue, lock, failures = iter(list(jobs)), threading.Lock(), []

        def loop(number: int) -> None:
            torch.set_num_threads(1)
            buffers = self._buffers[number]
            if buffers.device.type == "cuda":
                torch.cuda.set_device(buffers.device)
                stream: Any = torch.cuda.stream(torch.cuda.Stream(buffers.device))
            else:
                stream = contextlib.nullcontext()
            with stream, torch.inference_mode():
                while not failures:
                    with lock:
                        job = next(queue, None)
                    if job is None:
                        return
                    try:
                        work(job, buffers, number)
                    except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                        failures.append(error)

        threads = [threading.Thread(target=loop, args=(i,), daemon=True) for i in range(self.count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: stop at the next job, so that nobody writes into a folder being removed
            failures.append(KeyboardInterrupt())
            for thread in threads:
                thread.join()
            raise
        if failures:
            raise failures[0]

    def close(self) -> None:
        self._pool.close()
        for buffers in self._buffers:
            buffers.close()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_meetings = itertools.count()


@cache
def _meeting_place(rank: int, size: int) -> Any:
    """The launcher's store of addresses, kept open: a process can merge more than once."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", rank=rank, world_size=size))[0]


class World:
    """The processes started by ``accelerate launch`` or ``torchrun``; alone, everything is a no-op."""

    def __init__(self, size: int | None = None, rank: int | None = None) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1")) if size is None else size
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._group: Any = None
        self._owns = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> World:
        if self.size > 1:
            import torch.distributed as dist

            try:
                if not dist.is_initialized():
                    # Keys of their own for every meeting: those of an earlier merge would lead to closed connections.
                    store = dist.PrefixStore(f"hf_fuse/{next(_meetings)}", _meeting_place(self.rank, self.size))
                    dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
                    self._owns = True
                # Objects travel through gloo even where the launcher has set up NCCL for training. A process that dies
                # is noticed at once; one that is slow may take its time.
                self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            except (RuntimeError, ValueError) as error:
                raise FuseError(
                    f"WORLD_SIZE is {self.size}, but the processes can't meet ({first_line(error)}). Start them with "
                    "accelerate launch or torchrun, or unset WORLD_SIZE."
                ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._group is not None:
            # Nobody leaves before the lead has cleaned up: launchers kill the others as soon as one process ends.
            with contextlib.suppress(FuseError):
                self.gather(None if error is None else str(error) or type(error).__name__)
                if error is not None and not self.leads:
                    error.said_by_lead = True
            import torch.distributed as dist

            dist.destroy_process_group(None if self._owns else self._group)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, for everybody."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise FuseError(f"another process of this run has died ({first_line(error)}). Start again.") from error
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks finish the block, or all fail: a rank that failed alone would leave the others waiting forever."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure = error
        if self.size > 1:
            try:
                reports = self.gather(None if failure is None else str(failure) or type(failure).__name__)
            except FuseError as gone:
                raise failure or gone from None
            if failure is None and (found := [(rank, text) for rank, text in enumerate(reports) if text]):
                raise FuseError("process {} of the run: {}".format(*found[0]))
        if failure is not None:
            raise failure

    def share(self, units: list[Job], size: Callable[[Job], int]) -> list[Job]:
        """This rank's part: largest first to whoever has least, the same on all ranks."""
        loads, parts = [0] * self.size, [[] for _ in range(self.size)]
        for unit in sorted(units, key=size, reverse=True):
            least = min(range(self.size), key=loads.__getitem__)
            parts[least].append(unit)
            loads[least] += size(unit)
        return parts[self.rank]
