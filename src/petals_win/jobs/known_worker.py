"""One worker as an API sees it: whether it can be reached, what it says of itself, and how soon it would answer.

Knows links and the job model. Does not know the other workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from petals_win.engines.base import ModelCard, WorkerStatus
from petals_win.errors import UserError
from petals_win.jobs import model
from petals_win.jobs.failures import LinkLost, LinkRefused
from petals_win.jobs.links import Address, Link
from petals_win.jobs.load import beside

logger = logging.getLogger(__name__)

SILENCE_S = 5.0  # a worker that says nothing for so long has gone
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_REFUSED_PAUSE_S = 15.0  # before one that refused is asked again: somebody has to copy a file first
_ANSWER_S = 24 * 3600.0  # the longest answer; that a worker lives is known otherwise
_ONCE_S = 60.0  # for everything else
_USUAL_TOKENS = 200  # of an answer, as far as nobody knows
_CHARACTERS = 4  # of a token
_USUAL_SPEED = 10.0  # tokens per second, where nobody's is known
_PROMPT_FASTER = 8  # how much faster prompts are read than answers are written, where it was not measured
# Speeds that differ by less are taken for equal: how much slower answers are beside others is known roughly, so that of two like PCs the
# one that had more to do would seem to be another kind, and get more, or less, for good.
_ALIKE = 1.5

Connect = Callable[[Address], Awaitable[Link]]


class Speeds(NamedTuple):
    """Tokens per second of answers and of prompts."""

    tokens: float
    prompt: float

    @classmethod
    def usual(cls, workers: Iterable[KnownWorker]) -> Speeds:
        """The mean of those whose speeds are known."""
        states = [worker.state for worker in workers if worker.state]
        tokens = _mean([state.tokens_per_s for state in states if state.tokens_per_s]) or _USUAL_SPEED
        prompt = _mean([state.prompt_tokens_per_s for state in states if state.prompt_tokens_per_s])
        return cls(tokens, prompt or tokens * _PROMPT_FASTER)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _or_usual(speed: float | None, usual: float) -> float:
    return usual if speed is None or usual / _ALIKE < speed < usual * _ALIKE else speed


class KnownWorker:
    """`follow` keeps the connection; the rest answers from memory, but for the calls.

    running: what this API has asked it for, and not seen the end of.
    """

    def __init__(self, address: Address, connect: Connect):
        self.address = str(address)
        self.state: model.WorkerState | None = None
        self.cards: tuple[ModelCard, ...] = ()  # its models as it said last, also when it has gone
        self.running = 0
        self.looked = asyncio.Event()  # at least once
        self._where, self._connect = address, connect
        self._link: Link | None = None
        self._trouble: UserError = LinkLost(f"{self.address} was not reached yet.")
        self._others = 0  # answers that it has for others, as far as it said
        self._told: str | None = None

    async def follow(self) -> None:
        """Connect, listen to what the worker says of itself, and connect again when it is lost; until cancelled."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                self._link = await self._connect(self._where)
                async for said in _heartbeats(self._link):
                    self._heard(said)
                    pause = _FIRST_PAUSE_S
                raise LinkLost(f"The connection to {self.address} is lost: it has ended.")
            except UserError as error:
                self._trouble = error
            except Exception as error:
                logger.exception("The connection to %s broke down", self.address)
                self._trouble = LinkLost(f"The connection to {self.address} broke down: {error!r}.")
            finally:
                link, self._link, self.state = self._link, None, None
                if link is not None:
                    with contextlib.suppress(TimeoutError):
                        await link.close()
            self._say(str(self._trouble))
            self.looked.set()
            await asyncio.sleep(_REFUSED_PAUSE_S if isinstance(self._trouble, LinkRefused) else pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _heard(self, state: model.WorkerState) -> None:
        self._others = max(state.running + state.waiting - self.running, 0)
        self.state, self.cards = state, state.models
        self.looked.set()
        self._say("It is ending." if state.draining else "")

    def _say(self, trouble: str) -> None:
        """Tell the log what has changed."""
        if trouble != self._told:
            if trouble:
                logger.warning("Worker %s: %s", self.address, trouble)
            else:
                logger.info("Worker %s is there", self.address)
            self._told = trouble

    def card(self, name: str) -> ModelCard | None:
        """Its model of that name, if it takes questions."""
        if self.state is None or self.state.draining or self._link is None:
            return None
        return next((card for card in self.state.models if card.id == name), None)

    def seconds(self, characters: int, tokens: int | None, usual: Speeds) -> float:
        """How long until the last token of a question, asked now.

        :param characters: of the prompt, those that it has likely not computed yet
        :param tokens: the longest answer, if that is known
        :param usual: of all workers
        """
        state = self.state
        assert state is not None
        speed, reads = _or_usual(state.tokens_per_s, usual.tokens), _or_usual(state.prompt_tokens_per_s, usual.prompt)
        busy = self._others + self.running
        answer = min(tokens or _USUAL_TOKENS, _USUAL_TOKENS) / speed * beside(min(busy + 1, state.slots))
        prompt = characters / _CHARACTERS / reads * beside(min(busy + 1, state.slots))
        in_line = max(busy + 1 - state.slots, 0)
        return prompt + answer + in_line / state.slots * (answer + prompt)

    async def generate(self, question: bytes) -> AsyncGenerator[bytes, None]:
        """The replies to a question. Raises LinkLost when the worker has gone."""
        self.running += 1
        try:
            async with contextlib.aclosing(self._linked().call("Generate", question, _ANSWER_S)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            self.running -= 1

    async def once(self, method: str, request: bytes) -> bytes:
        """The one reply to anything else. Raises LinkLost."""
        self.running += 1
        try:
            async with contextlib.aclosing(self._linked().call(method, request, _ONCE_S)) as replies:
                async for reply in replies:
                    return reply
        finally:
            self.running -= 1
        raise LinkLost(f"{self.address} did not answer.")

    def _linked(self) -> Link:
        if self._link is None:
            raise self._trouble
        return self._link

    def status(self) -> WorkerStatus:
        """For people."""
        state = self.state
        if state is None:
            kind: Literal["gone", "refused"] = "refused" if isinstance(self._trouble, LinkRefused) else "gone"
            return WorkerStatus(self.address, kind, str(self._trouble))
        return WorkerStatus(
            self.address,
            "draining" if state.draining else "ready" if state.ready else "waiting",
            state.detail,
            state.name,
            tuple(card.id for card in state.models),
            state.running,
            state.waiting,
            state.slots,
            state.tokens_per_s,
        )


async def _heartbeats(link: Link) -> AsyncGenerator[model.WorkerState, None]:
    """What the worker says of itself. Raises LinkLost when it says nothing any more."""
    async with contextlib.aclosing(link.call("Watch", model.hello(), _ANSWER_S)) as replies:
        while True:
            reply = await _within(asyncio.ensure_future(anext(replies, None)))
            if reply is None:
                return
            yield model.state_in(reply)


async def _within(saying: asyncio.Future[bytes | None]) -> bytes | None:
    """What the worker says next. In steps, so that a PC that slept hears what came meanwhile before it takes the worker for gone."""
    try:
        for _ in range(int(SILENCE_S)):
            if (await asyncio.wait({saying}, timeout=1.0))[0]:
                return await saying
        raise LinkLost(f"The worker has said nothing for {SILENCE_S:.0f} s.")
    finally:
        if not saying.done():  # nobody may close the generator while it runs
            saying.cancel()
            await asyncio.wait({saying})
