"""From an answer in the making to an HTTP response, whole or as server-sent events, in whatever shape.

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

from petals_win.api.generations import Answer, Generations
from petals_win.engines.base import GenerationRequest

# A stream that breaks before its first event can still be answered with a status of its own. Proxies do not wait
# much longer than this for a first byte, so then the stream begins, and pings keep it open.
FIRST_EVENT_S = 10.0
PING_S = 15
# A client that has stopped reading must not hold its place for ever.
SEND_S = 60.0

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
    try:
        return await unless_disconnected(http, whole(answer))
    except BaseException:
        await answer.aclose()
        raise


async def answer_streamed(
    http: Request,
    generations: Generations,
    requests: Sequence[GenerationRequest],
    events: Callable[[Answer], AsyncIterator[ServerSentEvent]],
) -> EventSourceResponse:
    """Answer the requests, of which there is at least one, by the events that `events` makes of the answer as it comes.

    Raises ApiError, ClientDisconnect; what breaks later is for `events` to tell.
    """
    answer = generations.start(requests)
    try:
        await unless_disconnected(http, answer.begun(FIRST_EVENT_S))
    except BaseException:
        await answer.aclose()
        raise
    return _Stream(answer, events(answer))


def json_event(body: dict[str, Any], name: str | None = None) -> ServerSentEvent:
    """An event whose data is JSON in one line."""
    return ServerSentEvent(json.dumps(body, ensure_ascii=False, separators=(",", ":")), event=name, sep="\n")


class _Stream(EventSourceResponse):
    """Server-sent events; however the response ends, the answer is given up with it."""

    def __init__(self, answer: Answer, events: AsyncIterator[ServerSentEvent]):
        super().__init__(events, ping=PING_S, ping_message_factory=_ping, send_timeout=SEND_S)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


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
