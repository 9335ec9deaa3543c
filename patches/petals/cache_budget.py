"""Count the bytes of open sessions on the event loop instead of passing cache tensors through pipes.

Why: MemoryCache shares counters, locks and a pipe between processes and asserts that allocation happens in another process
    than use ("AssertionError: must be called by a ConnectionHandler, not runtime"); in one process both happen in one.
Status: windows-only
Upstream-issue: none
Drop-when: upstream's server runs in one process.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.memory_cache", digest="f1dbfb4c2286adf7")

import asyncio
import contextlib
from typing import AsyncIterator, Optional

UNLIMITED = 2**64 - 1


class AllocationFailed(Exception):
    """The KV cache that a session asked for does not fit into what this node sets aside for caches."""


class MemoryCache:
    """A budget of bytes for the KV caches of all sessions, kept on the event loop of the handlers.

    A session that does not fit waits for others to end, as long as its client said it would.
    """

    def __init__(self, max_size_bytes: Optional[int], max_alloc_timeout: Optional[float] = None):
        self.max_size_bytes = UNLIMITED if max_size_bytes is None else max_size_bytes
        self.max_alloc_timeout = max_alloc_timeout
        self.current_size_bytes = 0
        self._changed = asyncio.Condition()

    @property
    def bytes_left(self) -> int:
        return self.max_size_bytes - self.current_size_bytes

    @contextlib.asynccontextmanager
    async def reserve(self, size: int, timeout: Optional[float]) -> AsyncIterator[None]:
        """Hold `size` bytes of the budget inside the context. Waits up to `timeout` seconds (None: max_alloc_timeout).

        :raises AllocationFailed: the size exceeds the whole budget, or nothing was freed in time
        """
        if size > self.max_size_bytes:
            raise AllocationFailed(
                f"A session needs {size} bytes of KV cache, but this node sets aside {self.max_size_bytes} in all"
            )
        if self.max_alloc_timeout is not None:
            timeout = self.max_alloc_timeout if timeout is None else min(timeout, self.max_alloc_timeout)
        async with self._changed:
            try:
                fits = self._changed.wait_for(lambda: self.current_size_bytes + size <= self.max_size_bytes)
                await asyncio.wait_for(fits, timeout or 0.001)
            except asyncio.TimeoutError:
                raise AllocationFailed(
                    f"A session needs {size} bytes of KV cache, but only {self.bytes_left} are free on this node now"
                ) from None
            self.current_size_bytes += size
        try:
            yield
        finally:
            self.current_size_bytes -= size
            async with self._changed:
                self._changed.notify_all()
