"""Who does the work: threads of one process, and ranks of a launched group. Neither changes the result."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from hf_fuse.errors import FuseError
from hf_fuse.merge.sources import Buffers
from hf_fuse.merge.units import MERGE, Unit
from hf_fuse.registry import Method

Job = TypeVar("Job")
MAX_WORKERS = 8  # beyond, the disk or the memory bus is what one waits for


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def needs_whole_tensor(method: Method, unit: Unit) -> bool:
    """Whether the method must see this tensor in one piece instead of blocks."""
    if unit.action != MERGE:
        return False
    decide = getattr(method.module, "unit", None)
    if decide is None:
        return getattr(method.module, "UNIT", "element") == "tensor"
    names = inspect.signature(decide).parameters
    return decide(**{name: unit.options[name] for name in names}) == "tensor"


class Workers:
    """A group of threads with a :class:`Buffers` each. torch works single-threaded inside each of them: how torch
    splits an operation among its own threads would otherwise leak into the last bit."""

    def __init__(self, device: torch.device, dtype: torch.dtype, count: int | None = None):
        self.count = count or default_workers()
        self._buffers = [Buffers(device, dtype) for _ in range(self.count)]

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
        for buffers in self._buffers:
            buffers.close()


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

            if not dist.is_initialized():
                dist.init_process_group("gloo")
                self._owns = True
            # Objects travel through gloo even where the launcher has set up NCCL for training.
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, *failure: object) -> None:
        if self._owns:
            import torch.distributed as dist

            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, for everybody."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
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
            reports = self.gather(None if failure is None else str(failure) or type(failure).__name__)
            if failure is None and (text := next((r for r in reports if r), None)):
                raise FuseError(f"another process failed: {text}")
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
