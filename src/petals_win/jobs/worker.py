"""A worker: any engine, offered to callers. Knows the engine protocol and the job model; not who carries the messages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

from petals_win.engines.base import Engine, Full, Token, Usage
from petals_win.errors import UserError
from petals_win.jobs import model
from petals_win.jobs.failures import BadMessage, Draining, LinkRefused, WorkerFailed
from petals_win.jobs.load import Load

logger = logging.getLogger(__name__)

_LEAST_PAUSE_S = 0.05  # between two tellings of the state
_EMBEDDINGS_AT_ONCE = 4


class WorkerFull(Full):
    """The line of this worker is full."""

    def __init__(self, waiting: int):
        super().__init__(f"{waiting} questions wait at this worker already. Try again in a moment, or add a worker.")


class Worker:
    """Answers the calls of any number of APIs; `answer` is what transports ask.

    slots: answers computed at once; most_waiting: in line behind them.
    """

    def __init__(self, engine: Engine, name: str, *, slots: int, most_waiting: int | None = None):
        self.load = Load(slots)
        self._engine, self._name = engine, name
        self._most_waiting = 4 * slots if most_waiting is None else most_waiting
        self._draining = False
        self._watchers: set[asyncio.Event] = set()
        self._embedding = asyncio.Semaphore(_EMBEDDINGS_AT_ONCE)
        self._strangers: set[str] = set()

    async def answer(self, method: str, request: bytes, peer: str) -> AsyncGenerator[bytes, None]:
        """The replies to a call; the last one tells the error, if there is one."""
        try:
            async with contextlib.aclosing(self._replies(method, request, peer)) as replies:
                async for reply in replies:
                    yield reply
        except UserError as error:
            yield model.put_failure(error)
        except Exception:
            logger.exception("A question could not be answered")
            yield model.put_failure(WorkerFailed(f"The worker {self._name} failed at it. Its log tells more."))

    def drain(self) -> None:
        """Take no new questions from now on."""
        self._draining = True
        self._tell()

    async def drained(self, seconds: float) -> bool:
        """Wait until all answers are complete, at most so long; whether they are."""
        ends = time.monotonic() + seconds
        while self.load.running + self.load.waiting:
            if time.monotonic() > ends:
                return False
            await asyncio.sleep(0.05)
        return True

    def _replies(self, method: str, request: bytes, peer: str) -> AsyncGenerator[bytes, None]:
        match method:
            case "Watch":
                return self._watch(request, peer)
            case "Generate":
                return self._generate(request)
            case "Tokenize" | "Detokenize" | "Embed":
                return self._once(method, request)
            case _:
                raise BadMessage("This worker does not know the call: it has another version.")

    async def _watch(self, request: bytes, peer: str) -> AsyncGenerator[bytes, None]:
        try:
            model.check_hello(request)
        except LinkRefused as error:
            if peer not in self._strangers and len(self._strangers) < 256:
                self._strangers.add(peer)
                logger.warning("%s is refused: %s", peer, error)
            raise
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield model.put_state(self.state())
                await asyncio.sleep(_LEAST_PAUSE_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), model.HEARTBEAT_S - _LEAST_PAUSE_S)
        finally:
            self._watchers.discard(changed)

    def state(self) -> model.WorkerState:
        """What this worker says of itself."""
        status, load = self._engine.status(), self.load
        return model.WorkerState(
            self._name,
            tuple(self._engine.models()),
            status.ready and not self._draining,
            "It is ending." if self._draining else status.detail,
            self._draining,
            load.running,
            load.waiting,
            load.slots,
            load.tokens_per_s,
            load.prompt_tokens_per_s,
        )

    def _tell(self) -> None:
        for changed in self._watchers:
            changed.set()

    async def _generate(self, request: bytes) -> AsyncGenerator[bytes, None]:
        question, _ = model.question_in(request)
        if self._draining:
            raise Draining()
        if self.load.waiting >= self._most_waiting:
            raise WorkerFull(self.load.waiting)
        try:
            self._tell()
            async with self.load.place() as timed:
                async with contextlib.aclosing(self._engine.generate(question)) as events:
                    last: Usage | None = None
                    async for event in events:
                        if isinstance(event, Usage):
                            last = event
                        elif isinstance(event, Token):
                            timed.came()
                        yield model.put_event(event)
                if last is not None:
                    timed.complete(last.prompt_tokens - last.cached_tokens, last.completion_tokens)
        finally:
            self._tell()

    async def _once(self, method: str, request: bytes) -> AsyncGenerator[bytes, None]:
        if method == "Tokenize":
            question, special = model.question_in(request)
            yield model.put_ids(await self._engine.tokenize(question, special=special))
            return
        name, ids = model.tokens_in(request)
        if method == "Detokenize":
            yield model.put_text(await self._engine.detokenize(name, ids))
            return
        if self._draining:
            raise Draining()
        async with self._embedding:
            yield model.put_vector(await self._engine.embed(name, ids))
