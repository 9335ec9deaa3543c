"""Ending this process soon, whatever its threads are doing.

Knows what a process is given to end in order. Does not know why it has to end.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from petals_win.host.signals import request_stop

_GRACE_S = 1.5


def end_soon(reason: str, grace: float = _GRACE_S) -> None:
    """Set the stop event; if the process still lives `grace` seconds later, print the reason and end it with status 1."""

    def end() -> None:
        time.sleep(grace)
        print(reason, file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(1)

    threading.Thread(target=end, name="end soon", daemon=True).start()
    request_stop()
