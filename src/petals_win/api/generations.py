"""Running answers: how many at once, how they begin, end and are given up, what is counted and charged for them.

Knows the engine protocol and asyncio; not HTTP, and not the shape of what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from petals_win.api import callers
from petals_win.api.callers import Bill
from petals_win.api.counting import Counts, Run
from petals_win.api.errors import ApiError, from_engine
from petals_win.engines.base import Engine, Event, Finished, GenerationRequest, Loads, Usage
from petals_win.errors import UserError

logger = logging.getLogger(__name__)

# How far an answer may run ahead of a client that reads slowly.
_EVENTS_AHEAD = 64
_GIVE_UP_S = 30.0
# Longer than anybody who sits before a screen waits for others' answers.
TURN_S = 600.0

T = TypeVar("T")


class Generations:
    """All answers of one engine: at most `max_running` at a time, at most `max_waiting` in line behind them."""

    def __init__(self, engine: Engine, max_running: int, max_waiting: int, loads: Loads | None = None):
        """`loads` is the engine, if models of it have to be loaded."""
        self._loads = loads
        self.counts = Counts()
        self.stopping = asyncio.Event()
        self._engine = engine
        self._slots = asyncio.Semaphore(max_running)
        self._most = max_running + max_waiting
        self._answers: set[Answer] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # of answers and of other work

    @property
    def running(self) -> int:
        """How many are being answered."""
        return sum(answer.has_turn for answer in self._answers)

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._answers) - self.running

    def of_model(self, model: str) -> tuple[int, int]:
        """How many are being answered by the model of that name, and how many wait for their turn."""
        running = [answer.has_turn for answer in self._answers if answer.model == model]
        return sum(running), len(running) - sum(running)

    def start(self, requests: Sequence[GenerationRequest]) -> Answer:
        """Begin to answer the requests, one after the other, for the caller that asks now.

        Raises ApiError 429 if the line is full, or a limit of the caller's key is used up.
        """
        caller = self._admitted()
        bills = [Bill(caller, request) for request in requests]
        answer = Answer(self._engine, self._slots, requests, bills, self.counts, self._loads)
        self._answers.add(answer)
        answer.task.add_done_callback(lambda _: self._answers.discard(answer))
        self._keep(answer.task)
        return answer

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do other work of the engine's in the place of an answer. It ends when the caller is cancelled.

        Raises ApiError as `start`, and for what the work raises.
        """
        self._admitted()

        async def in_slot() -> T:
            async with _turn(self._slots):
                return await work()

        task = asyncio.create_task(in_slot())
        self._keep(task)
        try:
            return await task
        except Exception as error:
            raise _told(error) from error
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            raise _shutting_down() from None

    def stop(self) -> None:
        """End all answers, with an error for those who wait for them: the server is going down."""
        self.stopping.set()
        for task in self._tasks:
            task.cancel()

    def _admitted(self) -> callers.Caller | None:
        """The caller that asks now. Raises ApiError 429 if there is no place in the line, or a limit of its key is used up."""
        caller = callers.current.get()
        if len(self._tasks) >= self._most:
            self.counts.refused.labels("full").inc()
            raise ApiError(
                429,
                f"{len(self._tasks)} requests are being answered or wait already. Try again in a moment.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "5"},
            )
        if caller is not None:
            try:
                caller.admit()
            except ApiError:
                self.counts.refused.labels("key").inc()
                raise
        return caller

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _told(error: Exception) -> ApiError:
    """What work on a request ended by, as whoever asked is told of it; a defect goes to the log."""
    if isinstance(error, UserError):
        return from_engine(error)
    if isinstance(error, ApiError):
        return error
    logger.error("The engine failed", exc_info=error)
    return ApiError(500, "An error inside petals-win; its log has the details.")


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down")


class Answer:
    """One answer in the making, computed by a task of its own so that it can be given up at any point.

    Iterating yields (index of the request, event) and raises ApiError where the answer breaks.
    """

    def __init__(
        self,
        engine: Engine,
        slots: asyncio.Semaphore,
        requests: Sequence[GenerationRequest],
        bills: Sequence[Bill],
        counts: Counts,
        loads: Loads | None = None,
    ):
        self.has_turn = False
        self.model = requests[0].model
        self._loads = loads
        self._counts = counts
        self._known = {card.id for card in engine.models()}
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._ahead = asyncio.Semaphore(_EVENTS_AHEAD)
        self._told = False  # whether any event was put there
        self._over = False  # whether the end was read
        self._begun = asyncio.Event()
        self._error: ApiError | None = None
        self.task = asyncio.create_task(self._run(engine, slots, requests, bills))

    async def begun(self, patience: float) -> None:
        """Wait for the first event, at most `patience` seconds. Raises ApiError if the answer broke before it."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._begun.wait(), patience)
        if self._error and not self._told:
            raise self._error

    @property
    def has_more(self) -> bool:
        """Whether what comes next, the end included, is there already."""
        return self._over or not self._events.empty()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while (item := await self._events.get()) is not None:
            self._ahead.release()
            yield item
        self._over = True
        if self._error:
            raise self._error

    async def aclose(self) -> None:
        """Give the answer up, if it is not complete; afterwards the engine has released what it held."""
        self.task.cancel()
        await asyncio.wait({self.task}, timeout=_GIVE_UP_S)
        if not self.task.done():
            logger.error("The engine does not give up an answer that nobody waits for")

    async def _run(
        self,
        engine: Engine,
        slots: asyncio.Semaphore,
        requests: Sequence[GenerationRequest],
        bills: Sequence[Bill],
    ) -> None:
        run = self._count(requests[0])
        unused = list(bills)
        try:
            if self._loads is not None:
                # Without a place, so that who waits for a model to be loaded does not keep others from being answered.
                await self._loads.load(self.model)
            async with _turn(slots):
                self.has_turn = True
                run.has_turn()
                for index, (request, bill) in enumerate(zip(requests, bills, strict=True)):
                    if index:
                        run = self._count(request)
                    unused.remove(bill)
                    async with contextlib.aclosing(engine.generate(request)) as events:
                        async for event in events:
                            self._begun.set()
                            run.event(event)
                            if isinstance(event, Usage):
                                bill.total(event.prompt_tokens + event.completion_tokens)
                            elif not isinstance(event, Finished):
                                bill.piece()
                            await self._ahead.acquire()
                            self._events.put_nowait((index, event))
                            self._told = True
        except asyncio.CancelledError:
            self._error = _shutting_down()
            run.aborted()
            raise
        except Exception as error:
            self._error = _told(error)
            run.failed(self._error.status)
            unused = list(bills)  # what breaks costs nothing
        finally:
            for bill in unused:
                bill.total(0)
            self._begun.set()
            self._events.put_nowait(None)

    def _count(self, request: GenerationRequest) -> Run:
        # What models there are is the engine's to say: made-up names would be new lines of /metrics for ever.
        return Run(self._counts, request.model if request.model in self._known else "unknown")


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
