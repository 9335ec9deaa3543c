"""The thread that looks a model's servers up, and waiting for what it finds.

Knows periods, deadlines and failures. Does not know what a look-up reads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from petals_win.errors import UserError
from petals_win.host.futures import AwaitableFuture

logger = logging.getLogger(__name__)

MOST_SECONDS = 15.0  # that a question waits for a look-up


class LookUpFailed(UserError):
    """It could not be found out who serves the model. The cause is what the look-up raised."""

    def __init__(self, cause: Exception):
        super().__init__(f"It could not be found out which PCs serve the model: {str(cause) or type(cause).__name__}")
        self.__cause__ = cause


class LookUpThread(threading.Thread):
    """Looks servers up every `period` seconds, and at once when `trigger` is set.

    :param find: returns the function that looks up and then sets `ready`, None when nobody needs it any more
    """

    def __init__(self, period: float, find: Callable[[], Callable[[], None] | None]):
        super().__init__(name="look servers up", daemon=True)
        self._find, self._period = find, period
        self._round: AwaitableFuture[None] = AwaitableFuture()  # of the look-up in work, or else the next one
        self._begun = False
        self._lock = threading.Lock()
        self.ready = threading.Event()
        self.trigger = threading.Event()
        self._stopped = False

    def run(self) -> None:
        while not self._stopped and (look_up := self._find()) is not None:
            with self._lock:
                self._begun = True
            self.trigger.clear()
            failure = None
            try:
                look_up()
            except Exception as e:
                failure = LookUpFailed(e)
                logger.warning("%s", failure)
                logger.debug("The look-up failed here:", exc_info=True)
            del look_up  # which may keep alive whom it works for
            self._end_round(failure)
            self.trigger.wait(self._period)
        self._end_round(LookUpFailed(RuntimeError("this client has been shut down")))

    def look_up(self, timeout: float) -> None:
        """Wait for the look-up in work if it succeeds, else for a new one. Raises LookUpFailed if that fails or takes too long."""
        timeout = min(timeout, MOST_SECONDS)
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                waited_for, begun = self._round, self._begun
                if self.ident is None:
                    self.start()
            self.trigger.set()
            if self._stopped or not self.is_alive():
                raise LookUpFailed(RuntimeError("this client has been shut down"))
            try:
                return waited_for.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError as e:
                raise LookUpFailed(TimeoutError(f"nobody answered within {timeout:.0f} s")) from e
            except LookUpFailed:
                if not begun:  # one that had begun before may have failed for a reason that is gone
                    raise

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread; from the thread itself, or with `timeout` seconds over, without waiting for it."""
        self._stopped = True
        self.trigger.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout)

    def _end_round(self, failure: Exception | None) -> None:
        with self._lock:
            ended, self._round, self._begun = self._round, AwaitableFuture(), False
        if failure is None:
            ended.set_result(None)
        else:
            ended.set_exception(failure)
