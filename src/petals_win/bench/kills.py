"""Workers that are killed and return, again and again, while eight clients ask: what each question comes to, and what the API keeps of it.

Knows the router and processes. Does not know transports.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from petals_win.bench.steady import MODEL as STEADY
from petals_win.bench.worker_process import WorkerProcess, router_over
from petals_win.bench.workers import SCHEMES, running
from petals_win.engines.base import Finished, GenerationRequest, Token, Usage
from petals_win.errors import UserError
from petals_win.host.memory import own_bytes
from petals_win.jobs.failures import NoWorker, WorkerFailed
from petals_win.jobs.router import RoutedEngine

STREAMS = 8
_SILENCE_S = 30.0  # of an answer, before it counts as hanging
_KNOWN_S = 120.0  # from a worker's start or end until the router knows
_PACE_S = 0.005
_BETWEEN_S = 0.2  # that both workers of a pair answer, before one is killed
_PAUSE_S = 0.1  # of a client after an error
_SETTLED = 0.1  # of the kills, after which memory is looked at first


@dataclass
class Killed:
    """What the questions came to. answers: whole; broken: ended in one clear error behind a first token; refused: told before it that no
    worker can be reached, as may be where this PC is so busy that those which live are silent for too long; wrong: all else, by kind.

    examples: what the first of each kind of error said.
    memory: bytes of this process, in which the router is: after a tenth of the kills, and at the end.
    """

    kills: int = 0
    answers: int = 0
    broken: int = 0
    refused: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    wrong: Counter[str] = field(default_factory=Counter)
    settled_bytes: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0


async def soak_kills(
    model: str, home: Path, kills: int, *, pairs: int, tokens: int, seconds: float, report: Callable[[str], None]
) -> Killed:
    """Kill and restart workers `kills` times in all. Of each pair, one over gRPC and one over ZeroMQ, one at most is away.

    Raises UserError if a worker does not return, or all of it takes longer than `seconds`.
    """
    found = Killed()
    workers = [WorkerProcess(scheme, model, home, _PACE_S) for _ in range(pairs) for scheme in SCHEMES]
    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds), running(workers, home):
            engine = router_over(workers, home)
            try:
                await engine.start(lambda _why: None)
                await _run(engine, workers, model, kills, pairs, tokens, found, report)
            finally:
                await engine.close()
    except TimeoutError:
        raise UserError(
            f"{found.kills} of {kills} kills took {seconds:.0f} s, which is all the time that there was."
        ) from None
    found.seconds = time.monotonic() - began
    return found


async def _run(
    engine: RoutedEngine,
    workers: list[WorkerProcess],
    model: str,
    kills: int,
    pairs: int,
    tokens: int,
    found: Killed,
    report: Callable[[str], None],
) -> None:
    done = asyncio.Event()
    clients = [asyncio.create_task(_client(engine, model, tokens, number, done, found)) for number in range(STREAMS)]
    left = iter(range(kills))

    async def kill_on(pair: int) -> None:
        which = 0
        for number in left:
            await asyncio.sleep(_BETWEEN_S)
            at = 2 * pair + which
            await workers[at].kill()
            await _until(engine, at, ready=False)
            await workers[at].start()
            await _until(engine, at, ready=True)
            found.kills += 1
            which = 1 - which
            if found.kills >= _SETTLED * kills and not found.settled_bytes:
                found.settled_bytes = _memory()
            if number % max(1, kills // 20) == 0:
                report(
                    f"{found.kills} kills: {found.answers} answers, {found.broken} broken off, {found.refused} refused, {dict(found.wrong)} wrong"
                )

    try:
        await asyncio.gather(*map(kill_on, range(pairs)))
    finally:
        done.set()
        _, hanging = await asyncio.wait(clients, timeout=2 * _SILENCE_S)
        found.wrong["hanging"] += len(hanging)
        for client in hanging:
            client.cancel()
    for client in clients:
        if client.done() and not client.cancelled():
            client.result()
    found.wrong += Counter()  # without what is 0
    found.memory_bytes = _memory()


async def _until(engine: RoutedEngine, at: int, *, ready: bool) -> None:
    """Until the router knows that a worker is there, or has gone. Raises UserError if it does not get to know."""
    deadline = time.monotonic() + _KNOWN_S
    while (engine.workers[at].status().state == "ready") != ready:
        if time.monotonic() > deadline:
            said = engine.workers[at].status().detail
            raise UserError(f"The router has not heard that a worker {'is back' if ready else 'has gone'}: {said}")
        await asyncio.sleep(0.02)


async def _client(
    engine: RoutedEngine, model: str, tokens: int, number: int, done: asyncio.Event, found: Killed
) -> None:
    """Ask one question after the other, and look at what each comes to."""
    drawn = random.Random(number)
    name = engine.models()[0].id
    while not done.is_set():
        length = drawn.randint(1, tokens)
        request = GenerationRequest(
            model=name, prompt=f"client {number}", max_tokens=length, ignore_eos=True, temperature=0.0
        )
        kind, said = await _outcome(engine, request, model == STEADY)
        if said:
            found.examples.setdefault(kind, said)
        if kind == "answer":
            found.answers += 1
        elif kind == "broken":
            found.broken += 1
        elif kind == "refused":
            found.refused += 1
            await asyncio.sleep(_PAUSE_S)
        else:
            found.wrong[kind] += 1
            await asyncio.sleep(_PAUSE_S)


async def _outcome(engine: RoutedEngine, request: GenerationRequest, scripted: bool) -> tuple[str, str]:
    """What became of one question, in a word or two, and what an error said."""
    text, counted, ended = "", 0, False
    try:
        async with aclosing(engine.generate(request)) as events:
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    event = await anext(events, None)
                if event is None:
                    break
                if isinstance(event, Token):
                    text += event.text
                elif isinstance(event, Finished):
                    ended = True
                elif isinstance(event, Usage):
                    counted = event.completion_tokens
    except TimeoutError:
        return "silent for too long", ""
    except WorkerFailed as error:
        return "broken" if text else "broken before the first token", str(error)
    except NoWorker as error:
        return "no worker in the middle" if text else "refused", str(error)
    except Exception as error:  # no error that a worker's end should come to, or none that is meant for the asker
        return type(error).__name__, str(error)
    whole = ended and counted == request.max_tokens and (not scripted or len(text.split()) == counted)
    return "answer" if whole else "not whole", ""


def _memory() -> int:
    gc.collect()
    return own_bytes()
