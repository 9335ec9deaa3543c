"""How much memory processes have while something else is measured.

Knows processes. Does not know what they do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

import psutil

from petals_win.host.memory import own_bytes

_LOOK_S = 0.1


class MemoryWatch:
    """The most that each process of `pids` has ever had for itself, in bytes, by its name. A context, in which it looks."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._lock = threading.Lock()
        self._most = dict.fromkeys(pids, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def most(self) -> dict[str, int]:
        with self._lock:
            return dict(self._most)

    def look(self) -> dict[str, int]:
        """What each that still runs has now."""
        now: dict[str, int] = {}
        for name, process in self._processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                now[name] = own_bytes(process.pid)
        with self._lock:
            for name, nbytes in now.items():
                self._most[name] = max(self._most[name], nbytes)
        return now

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.look()
