"""A response that goes out piece by piece, as server-sent events or lines, until it is complete or nobody reads it any more.

Knows how pieces are written, and connections that are silent, slow or gone. Does not know what is told. A token of a small model
takes a few milliseconds, in which everything here runs once: what a library for such events does beside took longer than all the rest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING_S = 15.0
# Pieces that come faster than a screen shows them share a message, which costs the PC and its client more than they do.
SOON_S = 1 / 60
# A client that has stopped reading must not hold its place for ever.
SEND_S = 60.0

EVENTS = "text/event-stream"
COMMENT = b": ping\n\n"  # what is sent where nothing else is, so that proxies keep the connection
DONE = b"data: [DONE]\n\n"

_LINE_SEPARATORS = {number: f"\\u{number:04x}" for number in (0x85, 0x2028, 0x2029)}
_in_unicode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_in_ascii = json.JSONEncoder(separators=(",", ":")).encode


def json_event(body: dict[str, Any], name: str | None = None) -> bytes:
    """An event whose data is JSON in one line, also for clients that take Unicode's line separators for ends of a line."""
    data = _in_unicode(body)
    if not data.isascii():
        data = data.translate(_LINE_SEPARATORS)
    return f"data: {data}\n\n".encode() if name is None else f"event: {name}\ndata: {data}\n\n".encode()


def json_line(body: dict[str, Any]) -> bytes:
    """A line of JSON, in ASCII, since many clients take other characters (U+0085, U+2028) for the end of a line, too."""
    return _in_ascii(body).encode() + b"\n"


class Stream(Response):
    """Sends `pieces` as they come, those together of which `more` says that the next one is there already.

    `ping` makes what is sent every now and then between them.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str = EVENTS,
        ping: Callable[[], bytes] = lambda: COMMENT,
        more: Callable[[], bool] = lambda: False,
    ):
        self.status_code, self.background, self.media_type = 200, None, media_type
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # nginx would keep the pieces back
        self._pieces, self._ping, self._more = pieces, ping, more
        self._turn = asyncio.Lock()  # a ping waits for no piece, and a piece for no more than a ping
        self._held = b""
        self._late = asyncio.Event()  # whether what is held back has waited long enough
        self._timer: asyncio.TimerHandle | None = None  # which says so
        self._came = self._sent = float("-inf")  # when the last piece did, and the last message set out
        self._begun = self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._more():
            await self._begin(send)  # else with the first piece, which is there
        sending = (self._send_all(send), self._send_late(send), self._send_pings(send))
        try:
            await until_one_ends(*sending, self._overdue(), left(receive))
        finally:
            await self._pieces.aclose()

    async def _begin(self, send: Send) -> None:
        self._begun = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _send_all(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        async for piece in self._pieces:
            self._held += piece
            before, self._came = self._came, loop.time()
            next_one = self._came + (self._came - before)  # if it takes as long as this one
            if next_one > self._sent + SOON_S and not self._more():
                await self._send(send)
            elif self._timer is None:  # also if more is there, of which nothing may have to be told
                self._timer = loop.call_at(self._came + SOON_S, self._late.set)
        await self._send(send, complete=True)

    async def _send_late(self, send: Send) -> None:
        """Send what was held back for a piece that has not come."""
        while True:
            await self._late.wait()
            self._late.clear()
            if self._held:
                await self._send(send)

    async def _send_pings(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if not self._turn.locked():  # else something is on its way
                await self._send(send, self._ping())

    async def _send(self, send: Send, ping: bytes = b"", complete: bool = False) -> None:
        async with self._turn:
            if self._complete:
                return
            self._complete = complete
            self._sent = asyncio.get_running_loop().time()
            if not self._begun:
                await self._begin(send)
            body, self._held = self._held + ping, b""
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            await send({"type": "http.response.body", "body": body, "more_body": not complete})

    async def _overdue(self) -> None:
        """Returns when the client has not taken a piece for too long."""
        clock = asyncio.get_running_loop().time
        while (left := self._sent + SEND_S - clock() if self._turn.locked() else SEND_S) > 0:
            await asyncio.sleep(left)


async def until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Do all of it at once, until a part has ended; the others are cancelled. Raises what that part did."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def left(receive: Receive) -> None:
    """Returns when the client has left. The body of its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
