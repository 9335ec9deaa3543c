"""From an answer in the making to an HTTP response, whole or as a stream of events or lines, in whatever shape.

Knows when to stop computing: as soon as nobody waits for the answer. Does not know what an answer looks like.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from petals_win.api.blanks import expect_whole_answer
from petals_win.api.generations import Answer, Generations
from petals_win.api.streaming import COMMENT, EVENTS, Stream, left
from petals_win.engines.base import GenerationRequest

# A stream that breaks before its first event can still be answered with a status of its own. Proxies do not wait
# much longer than this for a first byte, so then the stream begins, and pings keep it open.
FIRST_EVENT_S = 10.0

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


async def answer_streamed(
    http: Request,
    generations: Generations,
    requests: Sequence[GenerationRequest],
    pieces: Callable[[Answer], AsyncGenerator[bytes, None]],
    media_type: str = EVENTS,
    ping: Callable[[], bytes] = lambda: COMMENT,
) -> Stream:
    """Answer the requests, of which there is at least one, by the pieces that `pieces` makes of the answer as it comes.

    `ping` makes what keeps the connection open. Raises ApiError, ClientDisconnect; what breaks later is for `pieces` to tell.
    """
    answer = generations.start(requests)
    try:
        await unless_disconnected(http, answer.begun(FIRST_EVENT_S))
    except BaseException:
        await answer.aclose()
        raise
    return _AnswerStream(answer, pieces(answer), media_type, ping)


class _AnswerStream(Stream):
    """A stream of an answer, which is given up however the response ends."""

    def __init__(
        self,
        answer: Answer,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        ping: Callable[[], bytes],
    ):
        super().__init__(pieces, media_type, ping, more=lambda: answer.has_more)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


async def unless_disconnected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but cancel it and raise ClientDisconnect when nobody waits for its result any more."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
