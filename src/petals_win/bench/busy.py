"""Programs that keep cores busy, beside which something is measured. Knows processes alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import psutil

from petals_win.host.children import spawn

_PROGRAM = """
from petals_win.host.children import exit_with_parent
exit_with_parent()
while True:
    pass
"""


@contextlib.contextmanager
def busy_program(wanted: bool = True) -> Iterator[None]:
    """For the length of a with block, another program computes on one core, at this one's priority. It ends with this one."""
    if not wanted:
        yield
        return
    child = spawn([sys.executable, "-c", _PROGRAM])
    try:
        yield
    finally:
        child.stop()


@contextlib.contextmanager
def awake_cores() -> Iterator[None]:
    """For the length of a with block no core goes to sleep: each has a program of the lowest priority, which gives way to any other."""
    with contextlib.ExitStack() as ends:
        for _ in range(os.cpu_count() or 1):
            child = spawn([sys.executable, "-c", _PROGRAM])
            ends.callback(child.stop)
            _put_last(child.pid)
        yield


def _put_last(pid: int) -> None:
    """Let the process run only where no other wants to."""
    if sys.platform == "win32":
        psutil.Process(pid).nice(psutil.IDLE_PRIORITY_CLASS)
    elif sys.platform == "linux":
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    else:
        psutil.Process(pid).nice(19)
