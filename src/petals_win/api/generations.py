"""Running answers: how many at once, how they begin, end and are given up.

Knows the engine protocol and asyncio; not HTTP, and not the shape of what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

import anyio

from petals_win.api.errors import ApiError, from_engine
from petals_win.engines.base import Engine, Event, GenerationRequest
from petals_win.errors import UserError

logger = logging.getLogger(__name__)

# How far an answer may run ahead of a client that reads slowly.
_EVENTS_AHEAD = 64
_GIVE_UP_S = 30.0
# Longer than anybody who sits before a screen waits for others' answers.
TURN_S = 600.0


class Generations:
    """All answers of one engine: at most `max_running` at a time, at most `max_waiting` in line behind them."""

    def __init__(self, engine: Engine, max_running: int, max_waiting: int):
        self._engine = engine
        self._slots = asyncio.Semaphore(max_running)
        self._most = max_running + max_waiting
        self._answers: set[Answer] = set()

    def start(self, requests: Sequence[GenerationRequest]) -> Answer:
        """Begin to answer the requests, one after the other. Raises ApiError 429 if the line is full."""
        if len(self._answers) >= self._most:
            raise ApiError(
                429,
                f"{len(self._answers)} requests are being answered or wait already. Try again in a moment.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "5"},
            )
        answer = Answer(self._engine, self._slots, requests)
        self._answers.add(answer)
        answer.task.add_done_callback(lambda _: self._answers.discard(answer))
        return answer

    def stop(self) -> None:
        """End all answers, with an error for those who wait for them: the server is going down."""
        for answer in self._answers:
            answer.task.cancel()


class Answer:
    """One answer in the making, computed by a task of its own so that it can be given up at any point.

    Iterating yields (index of the request, event) and raises ApiError where the answer breaks.
    """

    def __init__(self, engine: Engine, slots: asyncio.Semaphore, requests: Sequence[GenerationRequest]):
        self._sender, self._receiver = anyio.create_memory_object_stream[tuple[int, Event]](_EVENTS_AHEAD)
        self._begun = asyncio.Event()
        self._error: ApiError | None = None
        self.task = asyncio.create_task(self._run(engine, slots, requests))

    async def begun(self, patience: float) -> None:
        """Wait for the first event, at most `patience` seconds. Raises ApiError if the answer broke before it."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._begun.wait(), patience)
        if self._error:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        async for item in self._receiver:
            yield item
        if self._error:
            raise self._error

    async def aclose(self) -> None:
        """Give the answer up, if it is not complete; afterwards the engine has released what it held."""
        self.task.cancel()
        await asyncio.wait({self.task}, timeout=_GIVE_UP_S)
        if not self.task.done():
            logger.error("The engine does not give up an answer that nobody waits for")
        self._receiver.close()

    async def _run(self, engine: Engine, slots: asyncio.Semaphore, requests: Sequence[GenerationRequest]) -> None:
        try:
            async with _turn(slots):
                for index, request in enumerate(requests):
                    async with contextlib.aclosing(engine.generate(request)) as events:
                        async for event in events:
                            self._begun.set()
                            await self._sender.send((index, event))
        except ApiError as error:
            self._error = error
        except UserError as error:
            self._error = from_engine(error)
        except asyncio.CancelledError:
            self._error = ApiError(503, "The server is shutting down.", code="shutting_down")
            raise
        except Exception:
            logger.exception("The engine failed")
            self._error = ApiError(500, "An error inside petals-win; its log has the details.")
        finally:
            self._begun.set()
            self._sender.close()


@contextlib.asynccontextmanager
async def _turn(slots: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the places, for as long as the block runs. Raises ApiError 504 if none gets free in time."""
    try:
        async with asyncio.timeout(TURN_S):
            await slots.acquire()
    except TimeoutError:
        raise ApiError(
            504,
            f"This answer was not begun within {TURN_S:.0f} s, since others are still being computed. Try again later.",
            code="timeout",
        ) from None
    try:
        yield
    finally:
        slots.release()
