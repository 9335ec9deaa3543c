"""What workers give, and what they cost: eight questions by two workers over those by one, and a token's way over each transport.

Knows the engine protocol and the router. Does not know transports.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

from petals_win.bench.figures import Rounds
from petals_win.bench.steady import MODEL as STEADY
from petals_win.bench.steady import SteadyEngine, now_ns
from petals_win.bench.worker_process import PACE_S, WorkerProcess, make_secrets, router_over
from petals_win.engines.base import Engine, GenerationRequest, Token, Usage
from petals_win.errors import UserError

SCHEMES = ("grpc", "zmq")
STREAMS = (1, 16)
QUESTIONS = 8
_REST_S = 0.3  # between two sides: what has just computed may still wait awake for more

Report = Callable[[str], None]


@asynccontextmanager
async def running(workers: Sequence[WorkerProcess], home: Path) -> AsyncGenerator[None, None]:
    """Start them all at once; they end with the block."""
    make_secrets(home)
    try:
        await asyncio.gather(*(worker.start() for worker in workers))
        yield
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))


@asynccontextmanager
async def routed(workers: list[WorkerProcess], home: Path) -> AsyncGenerator[Engine, None]:
    """An engine over workers that run. Raises UserError if they do not let it in."""
    engine = router_over(workers, home)
    try:
        await engine.start(lambda _why: None)
        if not (status := engine.status()).ready:
            raise UserError(status.detail)
        yield engine
    finally:
        await engine.close()


async def measure_shares(model: str, home: Path, rounds: int, tokens: int, report: Report) -> Rounds:
    """Seconds for eight questions by one worker ("one_s") and by two ("two_s") of one thread each, over gRPC, by round."""
    found = Rounds()
    workers = [WorkerProcess("grpc", model, home) for _ in range(2)]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(workers, home))
        sides = {
            "one_s": await stack.enter_async_context(routed(workers[:1], home)),
            "two_s": await stack.enter_async_context(routed(workers, home)),
        }
        for engine in sides.values():
            await _questions(engine, 0, 4)  # what only the first answers pay for
        for number in range(1, rounds + 1):
            for name, engine in sides.items():
                seconds = await _questions(engine, number, tokens)
                found.add(name, seconds)
                report(f"round {number} of {rounds}: {QUESTIONS} questions, {name} {seconds:.2f}")
                await asyncio.sleep(_REST_S)
    return found


async def _questions(engine: Engine, number: int, tokens: int) -> float:
    """Seconds for all of them at once; each has a prompt that nobody had before."""
    model = engine.models()[0].id
    began = time.perf_counter()

    async def ask(which: int) -> None:
        request = GenerationRequest(
            model=model,
            messages=({"role": "user", "content": f"What are the {which}{number} best reasons to learn history?"},),
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            temperature=0.0,
        )
        async with aclosing(engine.generate(request)) as events:
            counts = [event.completion_tokens async for event in events if isinstance(event, Usage)]
        if counts != [tokens]:
            raise RuntimeError(f"An answer of {tokens} tokens was asked for, and {counts} came")

    await asyncio.gather(*(ask(which) for which in range(QUESTIONS)))
    return time.perf_counter() - began


async def measure_overheads(home: Path, rounds: int, tokens: int, report: Report) -> dict[str, list[float]]:
    """Milliseconds from a token's making to its arrival, of each token, by side and streams such as "grpc_16".

    The sides are the engine itself in this process ("direct"), and workers of it over each transport, in turns. Streams begin one after the
    other within the time between two tokens, as questions of different people do; "grpc_16_together" is of such as begin at once.
    """
    found: dict[str, list[float]] = {}
    workers = {scheme: WorkerProcess(scheme, STEADY, home) for scheme in SCHEMES}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(list(workers.values()), home))
        sides: dict[str, Engine] = {"direct": SteadyEngine(PACE_S)}
        for scheme, worker in workers.items():
            sides[scheme] = await stack.enter_async_context(routed([worker], home))
        for engine in sides.values():
            await _streams(engine, 1, 5, spread=True)
        for number in range(1, rounds + 1):
            for streams in STREAMS:
                for spread in (True, False) if streams > 1 else (True,):
                    for side, engine in sides.items():
                        name = f"{side}_{streams}" + ("" if spread else "_together")
                        delays = await _streams(engine, streams, tokens, spread=spread)
                        found.setdefault(name, []).extend(delays)
                        report(f"round {number} of {rounds}: {name} {statistics.median(delays):.3f} ms")
    return found


async def _streams(engine: Engine, count: int, tokens: int, *, spread: bool) -> list[float]:
    """Milliseconds from making to arrival, of the tokens of all streams."""

    async def stream(number: int) -> list[float]:
        await asyncio.sleep(number * PACE_S / count if spread else 0)
        delays: list[float] = []
        request = GenerationRequest(model=STEADY, prompt=f"stream {number}", max_tokens=tokens)
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, Token):
                    arrived = now_ns()
                    # More than one may come as one event, of which the last is the newest.
                    delays += [(arrived - int(made)) / 1e6 for made in event.text.split()]
        if len(delays) != tokens:
            raise RuntimeError(f"A stream of {tokens} tokens was asked for, and {len(delays)} came")
        return delays

    return [delay for delays in await asyncio.gather(*map(stream, range(count))) for delay in delays]


def overheads(delays: dict[str, list[float]]) -> dict[str, float]:
    """What each transport adds to the engine itself: the median and the 99th percentile, in milliseconds."""
    added = {}
    for name, values in delays.items():
        side, _, setting = name.partition("_")
        if side != "direct":
            direct = delays[f"direct_{setting}"]
            added[f"{name}_median_ms"] = statistics.median(values) - statistics.median(direct)
            added[f"{name}_p99_ms"] = percentile(values, 0.99) - percentile(direct, 0.99)
    return added


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
