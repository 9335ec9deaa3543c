"""Two p2pd programs side by side: latency of a call, rate of a stream, many calls at once.

Knows hivemind's P2P, through which both are driven, and is the one file of this room that does: it measures what a node
sees of its daemon. Does not know the command line.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from petals_win.host.loop import new_event_loop

PAYLOAD_BYTES = 4096  # a decode step's hidden state
STREAM_BYTES = 64 << 20
CONCURRENT_CALLS = 1000
_CALLS_OF_A_ROUND = 100
_SLICE_BYTES = 64 << 10  # as hivemind writes large payloads
_STEP_S = 120.0


@dataclass(frozen=True)
class DaemonFigures:
    """Of one program, medians over all rounds.

    :param latency_ms: of a unary call of PAYLOAD_BYTES in both directions
    :param stream_mb_per_s: of STREAM_BYTES in one direction, in 10^6 bytes
    :param concurrent_s: for CONCURRENT_CALLS, all started at once
    """

    latency_ms: float
    stream_mb_per_s: float
    concurrent_s: float


@dataclass(frozen=True)
class P2pdBenchReport:
    """Ratios are ours over the reference's, medians of the ratios within each round."""

    rounds: int
    ours: DaemonFigures
    reference: DaemonFigures
    latency_ratio: float
    rate_ratio: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_p2pd_bench(
    ours: Path, reference: Path, report: Callable[[str], None] = lambda _line: None, *, rounds: int = 15
) -> P2pdBenchReport:
    """Measure two daemons of each program on loopback; the programs take turns within a round.

    `report` gets a line for each step. Raises DaemonError if a daemon does not start, TimeoutError if one hangs.
    """
    loop = new_event_loop()
    try:
        return loop.run_until_complete(_measure(ours, reference, report, rounds))
    finally:
        loop.close()


@dataclass
class _Pair:
    """Two connected daemons of one program, and what was measured."""

    caller: Any
    callee: Any
    latencies_ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    concurrent_s: list[float] = field(default_factory=list)

    async def call(self) -> None:
        tensor = _message_type()
        message = tensor(buffer=bytes(PAYLOAD_BYTES))
        answer = await self.caller.call_protobuf_handler(self.callee.peer_id, "bench.call", message, tensor)
        if len(answer.buffer) != PAYLOAD_BYTES:
            raise RuntimeError(f"A call of {PAYLOAD_BYTES} bytes was answered with {len(answer.buffer)}")

    async def time_calls(self, count: int) -> None:
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            await self.call()
            times.append((time.perf_counter() - begun) * 1000)
        self.latencies_ms.append(statistics.median(times))

    async def time_stream(self, size: int) -> None:
        _, reader, writer = await self.caller.call_binary_stream_handler(self.callee.peer_id, "bench.stream")
        chunk = bytes(_SLICE_BYTES)
        begun = time.perf_counter()
        for _ in range(size // _SLICE_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write(b"\1")  # the end, which the other side confirms
        await writer.drain()
        await reader.readexactly(1)
        self.rates.append(size / (time.perf_counter() - begun) / 1e6)
        writer.close()

    async def time_concurrent(self) -> None:
        begun = time.perf_counter()
        await asyncio.gather(*(self.call() for _ in range(CONCURRENT_CALLS)))
        self.concurrent_s.append(time.perf_counter() - begun)

    def forget(self) -> None:
        self.latencies_ms.clear()
        self.rates.clear()
        self.concurrent_s.clear()

    def figures(self) -> DaemonFigures:
        return DaemonFigures(*(statistics.median(x) for x in (self.latencies_ms, self.rates, self.concurrent_s)))


async def _measure(ours: Path, reference: Path, report: Callable[[str], None], rounds: int) -> P2pdBenchReport:
    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(_running(program)) for program in (ours, reference)]
        report("two daemons of each program are running")

        async def everybody(step: Callable[[_Pair], Any], turn: int) -> None:
            for pair in pairs if turn % 2 == 0 else reversed(pairs):
                await asyncio.wait_for(step(pair), _STEP_S)

        await everybody(lambda pair: pair.time_calls(2 * _CALLS_OF_A_ROUND), 0)  # warm up
        await everybody(lambda pair: pair.time_stream(STREAM_BYTES // 4), 1)
        for pair in pairs:
            pair.forget()
        for turn in range(rounds):
            await everybody(lambda pair: pair.time_calls(_CALLS_OF_A_ROUND), turn)
            await everybody(lambda pair: pair.time_stream(STREAM_BYTES), turn)
            report(f"round {turn + 1} of {rounds}")
        for turn in range(3):
            await everybody(lambda pair: pair.time_concurrent(), turn)
        report(f"{CONCURRENT_CALLS} calls at once, three times")
        our, other = pairs
        return P2pdBenchReport(
            rounds=rounds,
            ours=our.figures(),
            reference=other.figures(),
            latency_ratio=_median_ratio(our.latencies_ms, other.latencies_ms),
            rate_ratio=_median_ratio(our.rates, other.rates),
        )


def _median_ratio(ours: list[float], others: list[float]) -> float:
    return statistics.median(our / other for our, other in zip(ours, others, strict=True))


@asynccontextmanager
async def _running(program: Path) -> AsyncIterator[_Pair]:
    from hivemind.p2p import P2P

    async def echo(request: Any, _context: Any) -> Any:
        return request

    async def sink(_info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunk = b"\0"
        while chunk and not chunk.endswith(b"\1"):
            chunk = await reader.read(1 << 20)
        writer.write(b"\1")
        await writer.drain()
        await reader.read(1)  # the caller closes
        writer.close()

    with _chosen(program):
        callee = await P2P.create(nat_port_map=False)
        try:
            caller = await P2P.create(await callee.get_visible_maddrs(), nat_port_map=False)
        except BaseException:
            await callee.shutdown()
            raise
    try:
        await callee.add_protobuf_handler("bench.call", echo, _message_type())
        await callee.add_binary_stream_handler("bench.stream", sink)
        yield _Pair(caller, callee)
    finally:
        await caller.shutdown()
        await callee.shutdown()


def _message_type() -> Any:
    """A message of hivemind's that carries bytes. Its module is made at run time, which type checkers cannot see."""
    return importlib.import_module("hivemind.proto.runtime_pb2").Tensor


@contextmanager
def _chosen(program: Path) -> Iterator[None]:
    """Let find_p2pd find this program."""
    before = os.environ.get("PETALS_WIN_P2PD")
    os.environ["PETALS_WIN_P2PD"] = str(program)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PETALS_WIN_P2PD"]
        else:
            os.environ["PETALS_WIN_P2PD"] = before
