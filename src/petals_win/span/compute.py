"""The one thread that owns a node's device: all torch work, loading included, is done there, the most urgent call first.

Knows calls and priorities. Does not know what they compute.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from petals_win.host.futures import AwaitableFuture
from petals_win.host.threads import computing
from petals_win.span.shortage import give_back

T = TypeVar("T")

_STOP = (float("-inf"), -1, None)


class ComputeThread(threading.Thread):
    """Runs calls one at a time, lowest priority value first, in order of submission among equals.

    Two threads that compute would start two OpenMP pools, which slow each other down by a quarter.
    """

    def __init__(self) -> None:
        super().__init__(name="compute", daemon=True)
        self._calls: queue.PriorityQueue[tuple[float, int, Any]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._later: list[tuple[float, int, Any]] = []  # a heap by time, of this thread alone
        self._stopped = False
        self._lock = threading.Lock()  # no call may be queued behind the one that says stop

    def submit(
        self, function: Callable[..., T], /, *args: Any, priority: float = 0.0, **kwargs: Any
    ) -> AwaitableFuture[T]:
        """Queue `function(*args, **kwargs)`; the future can be awaited on any event loop or waited for in any thread.

        A future that is cancelled before its turn is skipped. Raises RuntimeError once `stop` has been called.
        """
        future: AwaitableFuture[T] = AwaitableFuture()
        with self._lock:
            if self._stopped:
                raise RuntimeError("This node no longer computes: it is shutting down")
            self._calls.put((priority, next(self._order), (future, function, args, kwargs)))
        return future

    def submit_later(self, seconds: float, function: Callable[[], T], priority: float = 0.0) -> AwaitableFuture[T]:
        """As `submit`, after so many seconds. Only for calls that run on this thread: they need not wake it."""
        assert threading.current_thread() is self
        future: AwaitableFuture[T] = AwaitableFuture()
        due = (priority, next(self._order), (future, function, (), {}))
        heapq.heappush(self._later, (time.perf_counter() + seconds, due[1], due))
        return future

    def _next(self) -> tuple[float, int, Any]:
        """Wait for a call."""
        while True:
            now = time.perf_counter()
            while self._later and self._later[0][0] <= now:
                self._calls.put(heapq.heappop(self._later)[2])
            try:
                return self._calls.get(timeout=self._later[0][0] - now if self._later else None)
            except queue.Empty:
                continue

    def run(self) -> None:
        while True:
            _priority, _order, call = self._next()
            if call is None:
                break
            future, function, args, kwargs = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with computing():
                    result = function(*args, **kwargs)
            except BaseException as e:
                give_back(e)
                future.set_exception(e)
            else:
                future.set_result(result)
            # The loop variables would keep the last call's tensors alive until the next one comes.
            del future, function, args, kwargs, call
            result = None
        self._cancel_the_rest()

    def stop(self, timeout: float = 60) -> None:
        """Finish the call in work, cancel those that wait, end the thread. Waits up to `timeout` seconds."""
        with self._lock:
            self._stopped = True
            self._calls.put(_STOP)
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout)

    def _cancel_the_rest(self) -> None:
        for _time, _order, (_priority, _same_order, call) in self._later:
            call[0].cancel()
        while True:
            try:
                _priority, _order, call = self._calls.get_nowait()
            except queue.Empty:
                return
            if call is not None:
                call[0].cancel()
