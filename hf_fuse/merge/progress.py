"""One bar for the whole merge, in bytes read, on standard error; silent when nobody watches."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any


class Progress:
    """Counts bytes from many threads. ``total`` is an upper estimate: sampled passes read less."""

    def __init__(self, total: int = 0, *, quiet: bool = True):
        disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self._bar: Any = None
        self._lock = threading.Lock()
        if not quiet and not disabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="merge", mininterval=0.2)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.total = self._bar.n
                self._bar.refresh()
            self._bar.close()

    def add(self, count: int) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def phase(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description(name)
