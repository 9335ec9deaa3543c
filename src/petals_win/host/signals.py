"""How this process is told to end: Ctrl+C, SIGTERM, Ctrl+Break, or its parent.

Knows signal handlers and the one event that they set. Does not know what has to be ended.
"""

import os
import queue
import signal
import sys
import threading
import time
from types import FrameType

_requests: "queue.SimpleQueue[None]" = queue.SimpleQueue()


class _StopEvent(threading.Event):
    # Python on Windows runs signal handlers only between bytecodes of the main thread, so one long wait would
    # keep Ctrl+C from being noticed.
    _SLICE_S = 0.2 if sys.platform == "win32" else None

    def wait(self, timeout: float | None = None) -> bool:
        if self._SLICE_S is None:
            return super().wait(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        while not super().wait(self._SLICE_S if deadline is None else min(self._SLICE_S, deadline - time.monotonic())):
            if deadline is not None and time.monotonic() >= deadline:
                return False
        return True


_event: _StopEvent | None = None


def stop_event() -> threading.Event:
    """The event that is set when this process is asked to end; call it first on the main thread.

    The first SIGINT, SIGTERM or SIGBREAK sets it; the second ends the process at once with status 128 + number.
    """
    global _event
    if _event is None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Signal handlers belong to the main thread: call stop_event() there first")
        event = _event = _StopEvent()

        def set_when_asked() -> None:
            _requests.get()
            event.set()

        threading.Thread(target=set_when_asked, name="stop", daemon=True).start()
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _Handler())
    return _event


def request_stop() -> bool:
    """Set the stop event from any thread; False when nobody in this process has asked for it."""
    _requests.put(None)
    return _event is not None


class _Handler:
    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _Handler.asked:
            os._exit(128 + number)
        _Handler.asked = True
        # Event.set() takes a lock that the interrupted code may hold; SimpleQueue.put() is made for this place.
        _requests.put(None)
