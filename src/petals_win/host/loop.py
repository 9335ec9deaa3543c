"""The event loop of this system, and a thread that runs one.

Knows which loop implementation suits which operating system, and how a loop ends without losing a task. Does not know
what runs on it.
"""

import asyncio
import logging
import sys
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

from petals_win.host.crossing import call_soon
from petals_win.host.futures import AwaitableFuture

logger = logging.getLogger(__name__)
T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new event loop, not made current: winloop or uvloop where installed, otherwise asyncio's own.

    On Windows asyncio's own is the Proactor loop: the selector loop cannot start child processes.
    """
    if sys.platform == "win32":
        try:
            import winloop  # pyright: ignore[reportMissingImports]
        except ImportError:
            return asyncio.ProactorEventLoop()
        return winloop.new_event_loop()
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop()
    return uvloop.new_event_loop()


class LoopThread(threading.Thread):
    """A daemon thread that runs one event loop from `start` to `stop`.

    Any thread may hand it coroutines: `submit` returns at once, `call` waits.
    """

    def __init__(self, name: str):
        super().__init__(name=name, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = threading.Event()
        self._lock = threading.Lock()
        self._accepting = False
        self._grace_s = 10.0
        self._handed: deque[tuple[Coroutine[Any, Any, Any], AwaitableFuture[Any]]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError(f"The thread {self.name} has not been started: it has no event loop yet")
        return self._loop

    def start(self) -> None:
        """Start the thread; returns when its loop takes coroutines."""
        super().start()
        self._running.wait()
        if self._loop is None:
            raise RuntimeError(f"The thread {self.name} could not make its event loop: see the log")

    def run(self) -> None:
        # Made here and not in __init__: the Proactor loop ties itself to the signals of a main thread that makes it.
        try:
            loop = self._loop = new_event_loop()
            self._accepting = True
        finally:
            self._running.set()
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        except BaseException:
            logger.exception("The event loop of thread %s broke down", self.name)
        finally:
            with self._lock:
                self._accepting = False
            try:
                self._finish(loop)
            finally:
                asyncio.set_event_loop(None)
                loop.close()

    def submit(self, coro: Coroutine[Any, Any, T]) -> AwaitableFuture[T]:
        """Run `coro` on the loop. Cancelling the future cancels the task; the loop's end cancels both.

        Raises RuntimeError when the thread is not running.
        """
        future: AwaitableFuture[T] = AwaitableFuture()
        with self._lock:
            if not self._accepting:
                coro.close()
                raise RuntimeError(f"The thread {self.name} is not running: it takes no more work")
            self._handed.append((coro, future))
        call_soon(self.loop, self._begin_what_is_handed)
        return future

    def call(self, coro: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run `coro` on the loop and wait for its result in this thread.

        :param timeout: seconds after which the coroutine is cancelled and TimeoutError raised; None waits for ever
        """
        if threading.current_thread() is self:
            coro.close()
            raise RuntimeError(f"call() from the thread {self.name} itself would wait for ever: await the coroutine")
        future = self.submit(coro)
        try:
            return future.result(timeout)
        finally:
            future.cancel()

    def stop(self, timeout: float = 10.0) -> None:
        """Cancel every task, wait for them, close async generators and the loop, end the thread. Safe to call twice.

        :param timeout: seconds for all of it; what has not ended by then is named in the log and left behind
        """
        if threading.current_thread() is self:
            raise RuntimeError(f"stop() from the thread {self.name} itself would wait for ever")
        if not self.is_alive():
            return
        with self._lock:
            if self._accepting:
                self._accepting = False
                self._grace_s = timeout
                self.loop.call_soon_threadsafe(self.loop.stop)
        self.join(timeout + 1)
        if self.is_alive():
            logger.error("The thread %s is still busy %g s after it was told to stop", self.name, timeout)

    def _begin_what_is_handed(self) -> None:
        while self._handed:
            self._begin(*self._handed.popleft())

    def _begin(self, coro: Coroutine[Any, Any, T], future: AwaitableFuture[T]) -> None:
        loop = self.loop
        task = loop.create_task(coro)

        def pass_result_on(done: asyncio.Task[T]) -> None:
            if done.cancelled():
                future.cancel()
                future.set_running_or_notify_cancel()
            elif not future.set_running_or_notify_cancel():
                error = done.exception()  # nobody waits for it any more
                if error is not None:
                    logger.debug("Failed after it was cancelled: %r", error)
            elif (error := done.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())

        def pass_cancel_on(_: object) -> None:
            if future.cancelled() and not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        # The loop itself does not keep its tasks alive, and the caller may have dropped the future.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(pass_result_on)
        future.add_done_callback(pass_cancel_on)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        deadline = loop.time() + self._grace_s
        loop.call_soon(self._begin_what_is_handed)
        loop.run_until_complete(asyncio.sleep(0))
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            _, tasks = loop.run_until_complete(asyncio.wait(tasks, timeout=max(0.1, deadline - loop.time())))
            if loop.time() >= deadline:
                for task in tasks:
                    logger.error("The task %r on thread %s ignores that it was cancelled", task, self.name)
                break
        loop.run_until_complete(loop.shutdown_asyncgens())
