"""What of the log a user sees. Knows levels and how a line looks. Log files are petals_win.host.logs' business."""

from __future__ import annotations

import copy
import logging
import os

_OURS = "petals_win"

debugging = False


def set_up_logging(debug: bool) -> None:
    """Log to standard error: our own progress and everybody's warnings, with `debug` all there is, and tracebacks."""
    global debugging
    debugging = debug
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_DEBUG_FORMAT, _TIME) if debug else _Calm("%(asctime)s ", _TIME))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    if not debug:
        handler.addFilter(_is_for_users)
    os.environ.setdefault("PETALS_LOGGING", "false")  # petals would replace the handler by its own


def _is_for_users(record: logging.LogRecord) -> bool:
    # Libraries tell how they work; a user wants to hear of them when something is wrong.
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == _OURS


def log_for_a_parent() -> None:
    """Leave the time out: the parent process that shows these lines has its own."""
    if not debugging:
        for handler in logging.getLogger().handlers:
            if isinstance(handler.formatter, _Calm):
                handler.setFormatter(_Calm("", _TIME))


def is_bad_news(line: str) -> bool:
    """Whether a line that was logged for a parent is a warning or worse."""
    return line.partition(" ")[0] in ("WARN", "WARNING", "ERROR", "CRITICAL")  # hivemind renames WARNING


class _Calm(logging.Formatter):
    """One line for each record: the level only if it is a warning or worse, of an exception only what it says."""

    def __init__(self, prefix: str, datefmt: str):
        super().__init__(f"{prefix}%(message)s", datefmt)
        self._with_level = logging.Formatter(f"{prefix}%(levelname)s %(message)s", datefmt)

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        message = record.getMessage().rstrip(": \n")
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            message = f"{message}: {str(error) or type(error).__name__}"
        record.msg, record.args = message, ()
        record.exc_info = record.exc_text = record.stack_info = None
        return self._with_level.format(record) if record.levelno >= logging.WARNING else super().format(record)


_DEBUG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_TIME = "%H:%M:%S"
