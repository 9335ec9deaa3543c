"""A future that one thread fulfils and another thread, or a coroutine on any event loop, waits for.

Knows how a result crosses from a thread to an event loop. Does not know who computes it.
"""

import asyncio
import concurrent.futures
import sys
import time
from collections.abc import Generator
from typing import Any, TypeVar

from petals_win.host.crossing import call_soon, set_out

T = TypeVar("T")

# Python on Windows runs signal handlers only between bytecodes of the main thread, and a lock held by nobody else
# is waited for in one system call: without slices Ctrl+C would be noticed only after the result has come.
_SLICE_S = 0.2 if sys.platform == "win32" else None


class AwaitableFuture(concurrent.futures.Future[T]):
    """`concurrent.futures.Future` that can also be awaited, from any running event loop and by several tasks at once.

    Cancelling follows asyncio: cancelling the task that awaits it cancels the future too, unless the work has begun
    (`set_running_or_notify_cancel`); whoever must not do that awaits `asyncio.shield(future)`. Awaiting a cancelled
    future raises asyncio.CancelledError; `result()` raises concurrent.futures.CancelledError.
    """

    def __await__(self) -> Generator[Any, None, T]:
        if not self.done():
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()

            self.add_done_callback(lambda _: call_soon(loop, _release, waiter))
            try:
                yield from waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        try:
            return super().result()
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError() from None

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result in a thread; raises the work's error, or TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        set_out()  # the work may be among it
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            wait = left if _SLICE_S is None else min(_SLICE_S, _SLICE_S if left is None else left)
            try:
                return super().result(wait)
            except concurrent.futures.TimeoutError:
                if self.done():
                    return super().result()
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"No result within {timeout:g} s") from None


class WaitedFor(dict[Any, "asyncio.Future[Any]"]):
    """Futures by key. Those that are done or given up are not in it, whoever looks, until their owner takes them out.

    So an answer that comes in the moment in which its call is cancelled is one to an unknown call, and no error.
    """

    def __contains__(self, key: object) -> bool:
        future = self.get(key)
        return future is not None and not future.done()


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
