"""hivemind driven hard through our daemon: eight peers, many stores and gets, streams cut in the middle, a dead peer.

Whatever happens to the other side, every call ends within its deadline, in a result or in an error.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import AsyncIterator  # noqa: UP035  (hivemind tells streams by typing's name)

import pytest
from hivemind import DHT, P2PContext, ServicerBase, get_dht_time
from hivemind.dht import DHTNode
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2

PEERS = 8
KEYS = 2000
AT_ONCE = 4  # of each peer; all share one Python process
DEADLINE_S = 60.0  # a busy PC is no fault of the daemon's

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Service(ServicerBase):
    """Streams without an end, and a call that outlives its peer."""

    def __init__(self) -> None:
        self.streams: Counter[str] = Counter()
        self.waiting = 0

    async def rpc_count(
        self, requests: AsyncIterator[dht_pb2.PingRequest], context: P2PContext
    ) -> AsyncIterator[dht_pb2.PingResponse]:
        """Answer each request; fail at the first that asks for validation."""
        self.streams["opened"] += 1
        try:
            async for request in requests:
                if request.validate:
                    raise ValueError("not this one")
                yield dht_pb2.PingResponse(dht_time=1.0)
        finally:
            self.streams["ended"] += 1

    async def rpc_endless(
        self, request: dht_pb2.PingRequest, context: P2PContext
    ) -> AsyncIterator[dht_pb2.PingResponse]:
        self.streams["opened"] += 1
        try:
            while True:
                yield dht_pb2.PingResponse(dht_time=2.0)
                await asyncio.sleep(0)
        finally:
            self.streams["ended"] += 1

    async def rpc_slow(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        self.waiting += 1
        await asyncio.sleep(60)
        return dht_pb2.PingResponse()

    async def rpc_quick(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        return dht_pb2.PingResponse(dht_time=3.0)


class Swarm:
    """DHT peers, each with a daemon and a service of its own."""

    def __init__(self) -> None:
        self.dhts: list[DHT] = []
        self.services: list[Service] = []

    def grow(self, count: int) -> None:
        for _ in range(count):
            first = [str(address) for address in self.dhts[0].get_visible_maddrs()] if self.dhts else []
            dht, service = DHT(initial_peers=first, start=True), Service()

            async def register(_: DHT, node: DHTNode, service: Service = service) -> None:
                await service.add_p2p_handlers(node.p2p)

            self.dhts.append(dht)
            self.services.append(service)
            dht.run_coroutine(register)

    def everywhere(self, work, peers: list[int]) -> list:
        """Run `work(node, index)` on these peers, all at the same time."""

        def bound(index: int):
            async def run(_: DHT, node: DHTNode):
                return await work(node, index)

            return run

        futures = [self.dhts[i].run_coroutine(bound(i), return_future=True) for i in peers]
        return [future.result(500) for future in futures]

    def close(self) -> None:
        for dht in self.dhts:
            dht.shutdown()


@pytest.fixture(scope="module")
def swarm(our_program: str) -> Iterator[Swarm]:
    before = os.environ.get("PETALS_WIN_P2PD")
    os.environ["PETALS_WIN_P2PD"] = our_program
    swarm = Swarm()
    try:
        swarm.grow(PEERS)
        yield swarm
    finally:
        swarm.close()
        if before is None:
            del os.environ["PETALS_WIN_P2PD"]
        else:
            os.environ["PETALS_WIN_P2PD"] = before


async def settled(keys: range, attempt: Callable[[int], Awaitable[bool]]) -> int:
    """How many succeed. On a busy PC a peer can miss the DHT's own deadline of three seconds, and is then left alone for
    some more: that is an answer, too, and a later attempt must succeed."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(key: int) -> bool:
        async with limit:
            for pause_s in (5, 10, 20, 0):
                if await asyncio.wait_for(attempt(key), DEADLINE_S):
                    return True
                await asyncio.sleep(pause_s)
        return False

    return sum(await asyncio.gather(*(one(key) for key in keys)))


def test_two_thousand_stores_and_gets(swarm: Swarm) -> None:
    async def store(node: DHTNode, index: int) -> int:
        async def attempt(key: int) -> bool:
            return await node.store(f"key {key}", f"value {key}", get_dht_time() + 600)

        return await settled(range(index, KEYS, PEERS), attempt)

    async def get(node: DHTNode, index: int) -> int:
        async def attempt(key: int) -> bool:
            key = (key + 1) % KEYS  # which another peer has stored
            found = await node.get(f"key {key}", latest=True)
            return found is not None and found.value == f"value {key}"

        return await settled(range(index, KEYS, PEERS), attempt)

    assert sum(swarm.everywhere(store, list(range(PEERS)))) == KEYS
    assert sum(swarm.everywhere(get, list(range(PEERS)))) == KEYS


def test_streams_cut_in_the_middle(swarm: Swarm) -> None:
    async def cut(node: DHTNode, index: int) -> Counter[str]:
        """Streams to the next peer, cut off by the caller, by the end of its requests, or by the handler."""
        stub = Service.get_stub(node.p2p, swarm.dhts[(index + 1) % PEERS].peer_id)
        ends: Counter[str] = Counter()

        async def requests(count: int, last_fails: bool) -> AsyncIterator[dht_pb2.PingRequest]:
            for _ in range(count):
                yield dht_pb2.PingRequest()
            if last_fails:
                yield dht_pb2.PingRequest(validate=True)

        async def one(kind: int) -> None:
            if kind == 0:
                stream = await stub.rpc_endless(dht_pb2.PingRequest())
                for _ in range(50):
                    await stream.__anext__()
                await stream.aclose()
                ends["cut by the caller"] += 1
            elif kind == 1:
                answers = [answer async for answer in await stub.rpc_count(requests(50, False))]
                ends["whole" if len(answers) == 50 else "short"] += 1
            else:
                with pytest.raises(P2PHandlerError, match="not this one"):
                    async for _ in await stub.rpc_count(requests(50, True)):
                        pass
                ends["failed by the handler"] += 1

        await asyncio.wait_for(asyncio.gather(*(one(n % 3) for n in range(30))), DEADLINE_S * 2)
        return ends

    expected = Counter({"cut by the caller": 10, "whole": 10, "failed by the handler": 10})
    assert swarm.everywhere(cut, list(range(PEERS))) == [expected] * PEERS
    deadline = time.monotonic() + DEADLINE_S
    while any(service.streams["ended"] != 30 for service in swarm.services):
        assert time.monotonic() < deadline, [service.streams for service in swarm.services]
        time.sleep(0.1)


def test_a_peer_killed_during_calls(swarm: Swarm) -> None:
    victim, survivors = PEERS - 1, list(range(PEERS - 1))
    calls = 10

    async def daemon_process(node: DHTNode, _: int) -> int:
        return node.p2p._child.pid

    async def call(node: DHTNode, index: int) -> Counter[str]:
        dying = Service.get_stub(node.p2p, swarm.dhts[victim].peer_id)
        living = Service.get_stub(node.p2p, swarm.dhts[(index + 1) % (PEERS - 1)].peer_id)
        ends: Counter[str] = Counter()

        async def to_the_victim() -> None:
            begun = time.monotonic()
            try:
                await dying.rpc_slow(dht_pb2.PingRequest(), timeout=DEADLINE_S)
            except (P2PDaemonError, P2PHandlerError):
                ends["error"] += 1
            except TimeoutError:
                ends["deadline"] += 1
            assert time.monotonic() - begun < DEADLINE_S + 2

        async def to_a_survivor() -> None:
            for _ in range(50):
                answer = await living.rpc_quick(dht_pb2.PingRequest(), timeout=DEADLINE_S)
                assert answer.dht_time == 3.0
            ends["survivor"] += 1

        await asyncio.gather(*(to_the_victim() for _ in range(calls)), *(to_a_survivor() for _ in range(5)))
        with pytest.raises((P2PDaemonError, asyncio.TimeoutError)):  # nor does a new call hang
            await dying.rpc_quick(dht_pb2.PingRequest(), timeout=DEADLINE_S)
        return ends

    (pid,) = swarm.everywhere(daemon_process, [victim])

    async def kill_when_busy(_node: DHTNode, _index: int) -> None:
        while swarm.services[victim].waiting < calls * len(survivors):
            await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    killing = swarm.dhts[victim].run_coroutine(lambda _dht, node: kill_when_busy(node, victim), return_future=True)
    ends = swarm.everywhere(call, survivors)
    killing.result(60)
    assert ends == [Counter({"error": calls, "survivor": 5})] * len(survivors)
