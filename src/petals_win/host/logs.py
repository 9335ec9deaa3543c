"""A log file of what this process says, of bounded size.

Knows where log files lie and how they rotate. Does not know what is logged. Each process writes files of its own: on Windows
a file that another process has open cannot be rotated.
"""

import logging
import logging.handlers
import sys
from pathlib import Path

import filelock

from petals_win.host.folders import logs_folder

logger = logging.getLogger(__name__)

_BYTES = 2 * 2**20
_BACKUPS = 2
_AT_ONCE = 16  # processes of one kind, so that no more than 16 * 3 * 2 MiB are kept

_lock: filelock.BaseFileLock | None = None  # held until this process ends


def log_to_file(kind: str) -> Path | None:
    """Write what is logged in this process to a file, too; returns its path, or None where all names are taken.

    :param kind: what the process is, e.g. "serve": the file is serve.log, or serve-2.log beside a process that has that
    """
    global _lock
    for number in range(1, _AT_ONCE + 1):
        path = logs_folder() / (f"{kind}.log" if number == 1 else f"{kind}-{number}.log")
        lock = filelock.FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        _lock = lock
        handler = _File(path, maxBytes=_BYTES, backupCount=_BACKUPS, encoding="utf-8", errors="replace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        logger.info("Log file: %s", path)
        return path
    logger.warning("No log file: %d processes write %s logs already", _AT_ONCE, kind)
    return None


class _File(logging.handlers.RotatingFileHandler):
    """A log file that is given up, with one line, when it cannot be written: on a full disk, say."""

    _given_up = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._given_up:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._given_up:
            self._given_up = True
            logger.warning("The log file %s cannot be written any more: %s", self.baseFilename, error.strerror)
