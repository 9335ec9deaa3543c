"""The engine over workers: each question goes to the one that will answer soonest, and to another if that one fails before a word.

Knows the workers' states, the engine protocol and the job model. Does not know transports.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

from petals_win.engines.base import (
    ContextTooLong,
    EngineClosed,
    Event,
    Full,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    SwarmFailed,
    SwarmStatus,
    SwarmUnavailable,
)
from petals_win.errors import UserError
from petals_win.jobs import model as job_model
from petals_win.jobs.failures import BadMessage, Draining, LinkLost, NoWorker, WorkerFailed
from petals_win.jobs.known_worker import Connect, KnownWorker, Speeds
from petals_win.jobs.links import Address
from petals_win.jobs.prefixes import Prefixes, Prompt

_FIRST_LOOK_S = 6.0
# What another worker may do better. The rest is said of the request itself.
_ELSEWHERE = (LinkLost, Draining, EngineClosed, Full, SwarmUnavailable, SwarmFailed, ModelNotFound, BadMessage)


class RoutedEngine:
    """An Engine. Whoever the workers are is given once; they come and go."""

    def __init__(self, addresses: Sequence[Address], connect: Connect):
        self.workers = [KnownWorker(address, connect) for address in addresses]
        self._prefixes = Prefixes()
        self._following: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """Returns when each worker was reached or not. It is never lost for good: workers may come back."""
        self._following = [asyncio.create_task(worker.follow()) for worker in self.workers]
        looks = [asyncio.create_task(worker.looked.wait()) for worker in self.workers]
        _, late = await asyncio.wait(looks, timeout=_FIRST_LOOK_S)
        for look in late:
            look.cancel()

    def models(self) -> list[ModelCard]:
        """Those of all workers, also of such as have gone, each with the longest context that one of them has."""
        found: dict[str, ModelCard] = {}
        for card in (card for worker in self.workers for card in worker.cards):
            before = found.get(card.id)
            if before is None or before.context_length < card.context_length:
                found[card.id] = replace(card, created=before.created if before else card.created)
        return list(found.values())

    def status(self) -> SwarmStatus:
        workers = tuple(worker.status() for worker in self.workers)
        ready = sum(worker.state == "ready" for worker in workers)
        detail = f"{ready} of {len(workers)} workers {'answers' if ready == 1 else 'answer'}."
        if self._closed:
            return SwarmStatus(False, "petals-win is ending.", workers=workers)
        if not ready:
            detail += " " + " ".join(worker.detail for worker in workers)[:1000]
        return SwarmStatus(ready > 0, detail, workers=workers)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        question = job_model.put_question(request)
        prompt = Prompt(request)
        begun = False
        failures = _Failures(self, request.model)
        for worker in self._soonest(request, prompt, failures):
            replies = worker.generate(question)
            try:
                async with contextlib.aclosing(replies):
                    async for reply in replies:
                        event = job_model.event_in(reply)
                        if not begun:
                            begun = True
                            self._prefixes.answered(prompt, worker.address)
                        yield event
                if begun:
                    return
                raise LinkLost(f"{worker.address} ended the answer before its beginning.")
            except UserError as error:
                if self._closed:
                    raise EngineClosed() from error
                if begun:
                    raise _broken(error, worker) from error
                failures.came(error, worker)
        raise failures.worst()

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        return job_model.ids_in(
            await self._once("Tokenize", request.model, job_model.put_question(request, special=special))
        )

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        return job_model.text_in(await self._once("Detokenize", model, job_model.put_tokens(model, tokens)))

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        return job_model.vector_in(await self._once("Embed", model, job_model.put_tokens(model, tokens)))

    async def _once(self, method: str, name: str, request: bytes) -> bytes:
        failures = _Failures(self, name)
        for worker in self._soonest(GenerationRequest(model=name, prompt=""), None, failures):
            try:
                reply = await worker.once(method, request)
                job_model.check_reply(reply)
                return reply
            except UserError as error:
                if self._closed:
                    raise EngineClosed() from error
                failures.came(error, worker)
        raise failures.worst()

    def _soonest(
        self, request: GenerationRequest, prompt: Prompt | None, failures: _Failures
    ) -> Iterator[KnownWorker]:
        """The workers to ask, the one first that will answer soonest; looked at anew after each that has failed."""
        if self._closed:
            raise EngineClosed()
        asked: set[str] = set()
        while True:
            cards = {worker: worker.card(request.model) for worker in self.workers if worker.address not in asked}
            able = [worker for worker, card in cards.items() if card and card.context_length >= failures.least_context]
            # One whose engine is not ready may have news that have not come yet: it is asked when no other is left.
            able = [worker for worker in able if worker.state and worker.state.ready] or able
            if not able:
                return
            worker = min(able, key=self._seconds(able, request, prompt))
            asked.add(worker.address)
            yield worker

    def _seconds(
        self, able: Sequence[KnownWorker], request: GenerationRequest, prompt: Prompt | None
    ) -> Callable[[KnownWorker], float]:
        known = self._prefixes.known(prompt) if prompt else {}
        length = prompt.length if prompt else 0
        usual = Speeds.usual(able)
        return lambda worker: worker.seconds(length - known.get(worker.address, 0), request.max_tokens, usual)

    async def close(self) -> None:
        self._closed = True
        following, self._following = self._following, []
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


class _Failures:
    """What workers said that did not answer a question, and which error that comes to.

    least_context: of a worker that could still take the prompt.
    """

    def __init__(self, engine: RoutedEngine, name: str):
        self.least_context = 0
        self._engine, self._name = engine, name
        self._errors: list[UserError] = []

    def came(self, error: UserError, worker: KnownWorker) -> None:
        """Raises it if no other worker would do better."""
        if isinstance(error, ContextTooLong):
            card = worker.card(self._name)
            self.least_context = max(error.context_length, card.context_length if card else 0) + 1
        elif not isinstance(error, _ELSEWHERE):
            raise error
        self._errors.append(error)

    def worst(self) -> UserError:
        """The error to tell when no worker is left: of several the one that helps most."""
        models = self._engine.models()
        if self._name not in [card.id for card in models]:
            return ModelNotFound(self._name, [card.id for card in models])
        for kind in (ContextTooLong, Full, SwarmUnavailable, SwarmFailed):
            if found := [error for error in self._errors if isinstance(error, kind)]:
                return found[-1]
        says = "; ".join(f"{worker.address}: {worker.status().detail}" for worker in self._engine.workers)[:1000]
        last = f" The last one said: {self._errors[-1]}" if self._errors else ""
        return NoWorker(
            f"No worker can answer with {self._name} now ({says}).{last} Start 'petals-win worker' again, or wait until one is back."
        )


def _broken(error: UserError, worker: KnownWorker) -> UserError:
    """What an answer ends by that had begun: never told as if the request could be at fault of a worker's end."""
    if isinstance(error, LinkLost | EngineClosed | Draining | BadMessage):
        return WorkerFailed(
            f"The worker {worker.address} has gone, or broke off, in the middle of this answer. What came before is all of it: ask again."
        )
    return error
