"""How this process is told to end: Ctrl+C, SIGTERM, Ctrl+Break, a closed console, a shutdown, or its parent.

Knows signal and console handlers, and the one event that they set. Does not know what has to be ended.
"""

import os
import queue
import signal
import sys
import threading
import time
from types import FrameType

_requests: "queue.SimpleQueue[None]" = queue.SimpleQueue()

# Windows' console events that Python itself takes for Ctrl+Break, and then lets the system end the process.
_CLOSE, _LOGOFF, _SHUTDOWN = 2, 5, 6
# Windows waits 5 s after a console is closed and up to 20 s for a service at shutdown; then it ends the process itself.
_CONSOLE_GRACE_S = 30.0


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
        if sys.platform == "win32":
            _watch_console()
    return _event


def request_stop() -> bool:
    """Set the stop event from any thread; False when nobody in this process has asked for it."""
    _requests.put(None)
    return _event is not None


def on_console_event(event: int) -> bool:
    """Answer a console event of Windows, on the thread that the system makes for it; whether nobody else is to be asked.

    The process lives for as long as this takes, so it takes until the main thread has ended the process in order.
    """
    if event in (_CLOSE, _SHUTDOWN):
        _requests.put(None)
        time.sleep(_CONSOLE_GRACE_S)
        return True
    # Only services see a logoff, of any user; they go on. Ctrl+C and Ctrl+Break are signals already.
    return event == _LOGOFF


if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _on_console_event = ctypes.WINFUNCTYPE(wintypes.BOOL, wintypes.DWORD)(on_console_event)

    def _watch_console() -> None:
        # The handler that was added last is asked first: this one before Python's own.
        if not _kernel32.SetConsoleCtrlHandler(_on_console_event, True):
            raise ctypes.WinError(ctypes.get_last_error())


class _Handler:
    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _Handler.asked:
            os._exit(128 + number)
        _Handler.asked = True
        # Event.set() takes a lock that the interrupted code may hold; SimpleQueue.put() is made for this place.
        _requests.put(None)
