"""Ending this process soon, whatever its threads are doing.

Knows what a process is given to end in order. Does not know why it has to end.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

from petals_win.host.signals import request_stop

_GRACE_S = 1.5


def end_now(status: int) -> NoReturn:
    """End this process once its work is done, without Python's own end.

    That takes all modules apart, half a second of a core with torch and transformers and ten seconds on a busy PC, and was seen to
    loop for ever where threads had been cut off.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def end_soon(reason: str, grace: float = _GRACE_S) -> None:
    """Set the stop event; if the process still lives `grace` seconds later, print the reason and end it with status 1."""

    def end() -> None:
        time.sleep(grace)
        print(reason, file=sys.stderr)
        end_now(1)

    threading.Thread(target=end, name="end soon", daemon=True).start()
    request_stop()
