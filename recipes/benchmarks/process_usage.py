"""What a whole process and its children use: wall time, CPU time, resident and anonymous memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Usage:
    """What one process with its children used. Seconds and bytes; ``others`` is the load of the rest of the machine in
    cores; anonymous memory (not backed by a file) is None where the kernel does not tell."""

    wall: float
    cpu: float
    rss: int
    anonymous: int | None
    others: float | None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def anonymous_bytes(pid: int) -> int:
    """Memory of a process and its children that no file backs, from ``/proc``; 0 for a process that has gone."""
    total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        total = int(status.split("RssAnon:")[1].split()[0]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous_bytes(int(child)) for child in (task / "children").read_text().split())
    return total


def machine_cpu_seconds() -> float | None:
    """Seconds that all cores have been busy since boot."""
    with contextlib.suppress(OSError, ValueError):
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return None


def wait_for_calm(limit: float, patience: float = 60.0) -> bool:
    """Waits until less than ``limit`` cores have been busy for two seconds; False if that takes over ``patience`` s."""
    end = time.monotonic() + patience
    while True:
        busy, start = machine_cpu_seconds(), time.monotonic()
        time.sleep(2.0)
        after = machine_cpu_seconds()
        if busy is None or after is None or (after - busy) / (time.monotonic() - start) < limit:
            return True
        if time.monotonic() > end:
            return False


def measure(command: list[str], environment: dict[str, str]) -> Usage:
    """Runs one process to its end.

    Raises:
        RuntimeError: it failed; the message ends with the last lines that it wrote.
    """
    peak, finished = 0, threading.Event()

    def sample(pid: int) -> None:
        nonlocal peak
        while not finished.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes(pid))

    with tempfile.TemporaryFile() as output:
        busy, start = machine_cpu_seconds(), time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        sampler = threading.Thread(target=sample, args=(process.pid,), daemon=True)
        sampler.start()
        _, status, used = os.wait4(process.pid, 0)
        wall, after = time.perf_counter() - start, machine_cpu_seconds()
        finished.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            tail = output.read().decode(errors="replace").strip().splitlines()[-15:]
            raise RuntimeError("\n".join([f"exit status {process.returncode}: {command[:4]}", *tail]))
    cpu = used.ru_utime + used.ru_stime
    rss = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    others = None if busy is None or after is None else max(0.0, (after - busy - cpu) / wall)
    return Usage(wall, cpu, rss, peak or None, others)


def file_system(path: Path) -> str:
    """Type of the file system that holds ``path`` (``tmpfs`` lies in memory), ``unknown`` without ``/proc``."""
    found, longest = "unknown", -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            if path.resolve().is_relative_to(mount) and len(mount) >= longest:
                found, longest = kind, len(mount)
    return found


def memory_available() -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return 0
