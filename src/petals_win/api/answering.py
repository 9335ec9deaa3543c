"""From an answer in the making to an HTTP response, whole or as a stream of events or lines, in whatever shape.

Knows when to stop computing: as soon as nobody waits for the answer. Does not know what an answer looks like.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from petals_win.api.blanks import expect_whole_answer
from petals_win.api.generations import Answer, Generations
from petals_win.engines.base import GenerationRequest

# A stream that breaks before its first event can still be answered with a status of its own. Proxies do not wait
# much longer than this for a first byte, so then the stream begins, and pings keep it open.
FIRST_EVENT_S = 10.0
PING_S = 15
# A client that has stopped reading must not hold its place for ever.
SEND_S = 60.0

_LINE_SEPARATORS = {number: f"\\u{number:04x}" for number in (0x85, 0x2028, 0x2029)}

T = TypeVar("T")


async def answer_whole(
    http: Request,
    generations: Generations,
    requests: Sequence[GenerationRequest],
    whole: Callable[[Answer], Coroutine[Any, Any, T]],
) -> T:
    """Answer the requests, of which there is at least one, by what `whole` makes of the answer when it is complete.

    Raises ApiError, ClientDisconnect.
    """
    answer = generations.start(requests)
    expect_whole_answer(http.scope)
    try:
        return await unless_disconnected(http, whole(answer))
    except BaseException:
        await answer.aclose()
        raise


def comment() -> ServerSentEvent:
    """What is sent where nothing else is, so that proxies keep the connection."""
    return ServerSentEvent(comment="ping", sep="\n")


async def answer_streamed(
    http: Request,
    generations: Generations,
    requests: Sequence[GenerationRequest],
    events: Callable[[Answer], AsyncIterator[ServerSentEvent]],
    media_type: str = "text/event-stream",
    ping: Callable[[], ServerSentEvent] = comment,
) -> EventSourceResponse:
    """Answer the requests, of which there is at least one, by the events that `events` makes of the answer as it comes.

    `ping` makes what is sent where nothing comes for long. Raises ApiError, ClientDisconnect; what breaks later is for `events` to tell.
    """
    answer = generations.start(requests)
    try:
        await unless_disconnected(http, answer.begun(FIRST_EVENT_S))
    except BaseException:
        await answer.aclose()
        raise
    return _Stream(answer, events(answer), media_type, ping)


def json_event(body: dict[str, Any], name: str | None = None) -> ServerSentEvent:
    """An event whose data is JSON in one line, also for clients that take Unicode's line separators for ends of a line."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_LINE_SEPARATORS)
    return ServerSentEvent(data, event=name, sep="\n")


class JsonLine(ServerSentEvent):
    """What is an event elsewhere, as a line of JSON and nothing more.

    In ASCII, since many clients take other characters (U+0085, U+2028) for the end of a line, too.
    """

    def encode(self) -> bytes:
        return json.dumps(self.data, separators=(",", ":")).encode("ascii") + b"\n"


class _Nothing(ServerSentEvent):
    """What is sent in the place of a ping when there is none to send."""

    def encode(self) -> bytes:
        return b""


class _Stream(EventSourceResponse):
    """A stream of events; however the response ends, the answer is given up with it."""

    def __init__(
        self,
        answer: Answer,
        events: AsyncIterator[ServerSentEvent],
        media_type: str,
        ping: Callable[[], ServerSentEvent],
    ):
        super().__init__(
            events, media_type=media_type, ping=PING_S, ping_message_factory=self._keep_open, send_timeout=SEND_S
        )
        self._answer = answer
        self._ping_of_answer = ping

    def _keep_open(self) -> ServerSentEvent:
        # Nothing may come after the last event, which is on its way as soon as the answer is complete.
        return _Nothing() if self._answer.task.done() else self._ping_of_answer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


async def unless_disconnected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but cancel it and raise ClientDisconnect when nobody waits for its result any more."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
