"""The requests of one session, which come from the client and, pushed, from the server of the blocks before: each step once.

Knows an event loop and the numbers of steps. Does not know messages or networks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")

_MOST_AHEAD = (
    32  # requests that wait for their turn: what comes from the client stays in the network, what is pushed is dropped
)
_MOST_STEPS = 1024  # that are remembered: both requests of one step come close to each other


class Inbox(Generic[T]):
    """A context in which the client's `requests` are read; `first` was read from them already."""

    def __init__(self, first: T, requests: AsyncIterator[T]):
        self._requests = requests
        self._waiting: asyncio.Queue[T | None] = asyncio.Queue(_MOST_AHEAD)
        self._waiting.put_nowait(first)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._reading: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    async def __aenter__(self) -> Inbox[T]:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                await self._waiting.put(request)
        except Exception as e:  # whoever takes the next request is told
            self._failure = e
        await self._waiting.put(None)

    def push(self, request: T) -> bool:
        """Take what another server has sent; False if too much waits already, which the client's own request makes good."""
        if self._waiting.full():
            return False
        self._waiting.put_nowait(request)
        return True

    def end(self) -> None:
        """Take no more, and forget what waits, as if the client had ended the session."""
        if self._reading is not None:
            self._reading.cancel()
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)

    async def next(self, seconds: float) -> T | None:
        """The next request; None when the client has no more. Raises TimeoutError, and what reading them raised."""
        async with asyncio.timeout(seconds):
            request = await self._waiting.get()
        if request is None and self._failure is not None:
            raise self._failure
        return request

    def is_new(self, step: object) -> bool:
        """Whether no request of the step of this number was taken before; one without a number always is new."""
        if not isinstance(step, str):
            return True
        if step in self._seen:
            return False
        self._seen[step] = None
        if len(self._seen) > _MOST_STEPS:
            self._seen.popitem(last=False)
        return True
