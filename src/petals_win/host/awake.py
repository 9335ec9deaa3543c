"""Keeping the PC from going to sleep while it is needed.

Knows how Windows is told. Does not know what the PC is needed for. Linux and macOS do not put a PC to sleep that runs a
program without asking their desktop; whoever wants that there has systemd-inhibit and caffeinate to start programs with.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger(__name__)

_UNTIL_FURTHER_NOTICE = 0x80000000  # ES_CONTINUOUS
_SYSTEM = 0x00000001  # ES_SYSTEM_REQUIRED; the screen may go off


@contextlib.contextmanager
def stay_awake() -> Iterator[None]:
    """Keep the PC from falling asleep by itself within a with block, which begins and ends on one thread.

    The user can still send it to sleep, and a closed lid or an empty battery does. Elsewhere than on Windows nothing happens.
    """
    if not _set(_UNTIL_FURTHER_NOTICE | _SYSTEM):
        yield
        return
    try:
        yield
    finally:
        _set(_UNTIL_FURTHER_NOTICE)


def _set(state: int) -> bool:
    if sys.platform != "win32":
        return False
    import ctypes

    before = ctypes.windll.kernel32.SetThreadExecutionState(ctypes.c_uint(state))
    if before == 0:
        logger.warning("Windows does not promise to stay awake: this PC may fall asleep and drop out of the swarm.")
    return before != 0
