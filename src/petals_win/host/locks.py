"""Locks between processes that can say who holds them.

Knows lock files. Does not know what they protect. The system gives a lock back when its holder ends, however it ends;
the note beside it may then be out of date, and is trusted only while the lock is held.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from petals_win.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def hold_lock(path: Path, what: str, timeout: float = 0) -> Iterator[None]:
    """Hold the lock file `path` for the length of a with block.

    :param what: what the holder does, as a noun, e.g. "the node on port 31330"; shown to whoever has to wait
    :param timeout: seconds to wait for another holder; UserError, which names it, when it still holds the lock then
    """
    lock = filelock.FileLock(path)
    # Windows does not let others read a locked file, so the holder's name stands beside it.
    note = path.with_name(path.name + ".holder")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = _read(note)
        if timeout:
            logger.info("Waiting up to %g s for %s", timeout, holder)
        try:
            lock.acquire(timeout=timeout)
        except filelock.Timeout:
            raise UserError(f"{_read(note)} holds {path}. Stop it first, or wait until it has ended.") from None
    # On Windows it can be neither written nor deleted in the moment in which somebody who waits reads it.
    try:
        with suppress(PermissionError):
            note.write_text(f"{what} (process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})", "utf-8")
        yield
    finally:
        with suppress(PermissionError):
            note.unlink(missing_ok=True)
        lock.release()


def _read(note: Path) -> str:
    try:
        return note.read_text("utf-8") or "Another process"
    except OSError:
        return "Another process"
