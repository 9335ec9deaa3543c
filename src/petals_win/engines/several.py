"""Several engines as one: questions go by the name of a model, which is loaded when somebody asks, and unloaded when idle.

Knows who uses a model, who waits for one, and whose turn it is. Does not know what computes, nor how many bytes anything takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from petals_win.engines.base import (
    Engine,
    EngineClosed,
    Event,
    Full,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    SwarmStatus,
)
from petals_win.engines.member import LINGER_S, PAUSE_S, Life, Member, NotLoaded, again
from petals_win.engines.moving import let_go, open_in_thread
from petals_win.engines.offers import Offer
from petals_win.engines.room import sizes, who_goes
from petals_win.errors import UserError
from petals_win.host.memory import give_back_memory

logger = logging.getLogger(__name__)

# As Ollama's, which its clients count on: who reads an answer is back sooner, who begins to play wants the memory.
KEEP_ALIVE_S = 300.0
PATIENCE_S = 600.0  # that a question waits for its model


class SeveralEngines:
    """An Engine, and Loads. Each offer's engine is there from the beginning if it is in `opened`, and else loaded when asked for.

    keep_alive: seconds after which an idle model is unloaded; inf: never. What does not unload stays.
    """

    def __init__(self, offers: Sequence[Offer], keep_alive: float, opened: Sequence[Engine | None] = ()):
        self._keep_alive = keep_alive
        self._members = [Member(offer, offer.cards, keep_alive) for offer in offers]
        for member, engine in zip(self._members, opened, strict=False):
            member.life = None if engine is None else Life(member.offer, engine)
        self._moving = asyncio.Lock()  # one at a time: what is free is known only when nobody else takes of it
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._letting_go: set[asyncio.Task[None]] = set()
        self._on_lost: Callable[[UserError], None] = lambda _why: None
        self._closed = False

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """Start what is there. It is lost as soon as its only engine is; of several the others go on."""
        self._on_lost = on_lost
        for member in self._members:
            if member.life is not None:
                await self._start(member, member.life)
        self._watching = asyncio.create_task(self._unload_the_idle())

    async def _start(self, member: Member, life: Life) -> None:
        loop = asyncio.get_running_loop()

        def lost(why: UserError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(self._is_lost, member, life, why)

        await life.engine.start(lost)

    def models(self) -> list[ModelCard]:
        """Those of all, loaded or not; of two with one name the first."""
        found: dict[str, ModelCard] = {}
        for member in self._members:
            for card in member.told_cards():
                found.setdefault(card.id, card)
        return list(found.values())

    def status(self) -> SwarmStatus:
        if self._closed:
            return SwarmStatus(False, "petals-win is ending.")
        each = [(member, member.life.engine.status() if member.life else None) for member in self._members]
        engines = tuple(member.told(status) for member, status in each)
        if len(each) == 1 and each[0][1] is not None:
            return replace(each[0][1], engines=engines)
        able = [engine for engine in engines if engine.ready]
        loaded = [name for engine in engines if engine.state == "loaded" for name in engine.models]
        detail = f"{len(able)} of {len(engines)} engines can answer; in memory: {', '.join(loaded) or 'no model yet'}."
        if not able:
            detail = " ".join(engine.detail for engine in engines)[:1000]
        first = next((engine for engine in engines if engine.peers or engine.missing_blocks), None)
        return SwarmStatus(
            bool(able),
            detail,
            first.missing_blocks if first else (),
            tuple(peer for engine in engines for peer in engine.peers),
            first.num_blocks if first else 0,
            workers=tuple(worker for _, status in each if status for worker in status.workers),
            engines=engines,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async with self._held(request.model) as engine, contextlib.aclosing(engine.generate(request)) as events:
            async for event in events:
                yield event

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        async with self._held(request.model) as engine:
            return await engine.tokenize(request, special=special)

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        async with self._held(model) as engine:
            return await engine.detokenize(model, tokens)

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        async with self._held(model) as engine:
            return await engine.embed(model, tokens)

    async def load(self, model: str) -> None:
        await self._at_hand(self._member(model))

    def keep(self, model: str, seconds: float) -> None:
        self._member(model).keep_s = seconds
        self._change()

    def expires(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for member in self._members:
            if member.life is not None:
                now = member.left_s if member.left_s < math.inf or not member.offer.unloads else member.keep_s
                found |= {card.id: max(now, 0.0) for card in member.told_cards()}
        return found

    async def close(self) -> None:
        self._closed = True
        stopping = [task for task in (self._watching, *(each.loading for each in self._members)) if task is not None]
        for task in stopping:
            task.cancel()
        self._change()
        await asyncio.gather(*stopping, return_exceptions=True)
        await asyncio.gather(*(each.life.engine.close() for each in self._members if each.life is not None))
        await asyncio.gather(*self._letting_go, return_exceptions=True)

    def _member(self, model: str) -> Member:
        if self._closed:
            raise EngineClosed()
        for member in self._members:
            if any(card.id == model for card in member.told_cards()):
                return member
        raise ModelNotFound(model, [card.id for card in self.models()])

    @contextlib.asynccontextmanager
    async def _held(self, model: str) -> AsyncIterator[Engine]:
        """The engine of a model, which is not unloaded as long as the block runs."""
        life = await self._at_hand(self._member(model))
        life.users += 1
        try:
            yield life.engine
        finally:
            life.users -= 1
            life.used = time.monotonic()
            self._change()

    async def _at_hand(self, member: Member) -> Life:
        """Wait until the model is in memory. Between this and its next use nobody else may be asked."""
        member.waiting += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (life := member.life) is None or member.leaving:
                    if self._closed:
                        raise EngineClosed()
                    if life is not None:
                        await self._next_change()
                    elif (error := await asyncio.shield(self._load(member))) is not None:
                        raise again(error)
            return life
        except TimeoutError:
            raise Full(
                f"{member.name} is not in memory, and was not loaded within {PATIENCE_S:.0f} s. Try again in a few minutes."
            ) from None
        finally:
            member.waiting -= 1
            self._change()

    def _load(self, member: Member) -> asyncio.Task[UserError | None]:
        """The one task that loads the model; with it, everybody who waits. Raises what it failed by a moment ago."""
        if member.failure is not None and time.monotonic() - member.since < PAUSE_S:
            raise again(member.failure)
        if member.loading is None:
            member.since, member.failure = time.monotonic(), None
            member.loading = asyncio.create_task(self._loaded(member))
        return member.loading

    async def _loaded(self, member: Member) -> UserError | None:
        """Load the model, and say by which error that failed. Nobody's leaving ends it, once it has begun."""
        try:
            failure = await self._failure_to_load(member)
            if failure is None:
                return None
            logger.warning("%s", failure)
            await asyncio.to_thread(give_back_memory)
            member.since, member.failure = time.monotonic(), failure
            return failure
        except asyncio.CancelledError:
            if self._closed:
                return EngineClosed()
            raise
        finally:
            member.loading = None
            self._change()

    async def _failure_to_load(self, member: Member) -> UserError | None:
        try:
            async with self._moving:
                if await self._make_room(member):
                    member.life = await self._open(member)
                    logger.info("%s is loaded", member.name)
            return None
        except Full as error:
            return again(error)  # without its traceback, which would hold what there is of the model
        except UserError as error:
            return NotLoaded(f"{member.name} could not be loaded: {error}")
        except Exception:
            logger.exception("%s could not be loaded", member.name)
            return NotLoaded(
                f"{member.name} could not be loaded, by an error inside petals-win; its log has the details."
            )

    async def _open(self, member: Member) -> Life:
        life = Life(member.offer, await open_in_thread(member.offer))
        try:
            await self._start(member, life)
        except BaseException:
            await life.engine.close()
            raise
        return life

    async def _make_room(self, member: Member) -> bool:
        """Unload what is idle until the model fits; False if nobody wants it any more. Raises Full if it cannot fit.

        Of the models that are in use, those that have to go take no new questions, and go when they have answered the old ones.
        """
        began = time.monotonic()
        asked_to_leave: list[Member] = []
        try:
            while member.waiting:
                loaded = [each for each in self._members if each.life is not None and each.offer.unloads]
                by_use = sorted((each.life for each in loaded if each.life), key=lambda life: -life.idle_s)
                going = who_goes(member.offer, by_use)
                if going is None:
                    raise Full(
                        f"{member.name} does not fit into this PC now: {sizes(member.offer)}. Close other programs, or choose a "
                        "smaller model."
                    )
                if not going:
                    return True
                leaves = [each for each in loaded if each.life in going]
                free = [each for each in leaves if each.life is not None and each.life.idle_s > LINGER_S]
                if free:
                    await self._unload(free[0])
                    continue
                if time.monotonic() - began > LINGER_S:
                    asked_to_leave += leaves
                    for each in leaves:
                        each.leaving = True
                await self._next_change(LINGER_S)
            return False
        finally:
            for each in asked_to_leave:
                each.leaving = False
            self._change()

    async def _unload_the_idle(self) -> None:
        while not self._closed:
            member = min(self._members, key=lambda each: each.left_s)
            if member.left_s > 0:
                await self._next_change(member.left_s)
                continue
            async with self._moving:
                if member.left_s <= 0:
                    await self._unload(member)

    async def _unload(self, member: Member) -> None:
        """Only by whoever has `_moving`."""
        life = member.life
        assert life is not None
        member.life, member.keep_s, member.leaving = None, self._keep_alive, False
        await asyncio.shield(self._keep(let_go(life, member.name)))
        self._change()

    def _is_lost(self, member: Member, life: Life, why: UserError) -> None:
        """An engine will never answer again. Where there are others, it is loaded anew when somebody asks for it."""
        if len(self._members) == 1:
            self._on_lost(why)
        if member.life is not life or self._closed or len(self._members) == 1:
            return
        logger.warning("%s", why)
        member.life, member.since, member.failure = None, time.monotonic(), NotLoaded(str(why))
        self._keep(self._bury(life, member.name))

    async def _bury(self, life: Life, name: str) -> None:
        """Close an engine that was lost, when its answers have heard of it."""
        while life.users and not self._closed:
            await self._next_change()
        await let_go(life, name)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._letting_go.add(task)
        task.add_done_callback(self._letting_go.discard)
        return task

    async def _next_change(self, patience: float = math.inf) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience if patience < math.inf else None):
                await self._changed.wait()

    def _change(self) -> None:
        """Wake all that wait for something to change."""
        self._changed.set()
        self._changed = asyncio.Event()
