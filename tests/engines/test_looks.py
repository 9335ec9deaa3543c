"""The engine "petals" and its looks at the swarm, without nodes: what the DHT tells is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hivemind import DHT, PeerID
from tiny_chat import tiny_chat_model
from torch import nn

from petals_win.client.hollow import hollow_model
from petals_win.engines import petals
from petals_win.engines.base import PeerStatus
from petals_win.engines.petals import PetalsEngine
from petals_win.models.source import open_model
from petals_win.span.compute import ComputeThread
from petals_win.swarm.state import PeerState, SwarmState

PEER = PeerID(b"\x12\x20" + b"a" * 32)
COMPLETE = SwarmState(2, (PeerState(PEER.to_base58(), 0, 2, True, 1.0),))


@pytest.fixture
def engine(tmp_path, compute: ComputeThread):
    source = open_model(str(tiny_chat_model(tmp_path / "tiny", context=64)))
    dht = DHT(start=True)
    try:
        yield PetalsEngine(source, hollow_model(source, nn.Identity()).eval(), compute, dht)
    finally:
        dht.shutdown()


def look(monkeypatch, engine: PetalsEngine, tell: Callable[[int], SwarmState], ends: Callable[[], bool]) -> int:
    """Let the engine follow what `tell` says of each look, until `ends`; returns how many looks there were."""
    looks = 0

    async def read(*_of_what: object) -> SwarmState:
        nonlocal looks
        looks += 1
        return tell(looks)

    async def follow() -> None:
        await engine.start(lambda why: None)
        async with asyncio.timeout(60):
            while not ends():
                await asyncio.sleep(0.01)
        await engine.close()

    monkeypatch.setattr(petals, "read_state", read)
    monkeypatch.setattr(petals, "_POLL_SECONDS", 0.01)
    asyncio.run(follow())
    return looks


def test_a_look_that_fails_makes_no_node_disappear(engine, monkeypatch, caplog):
    ready: list[bool] = []

    def tell(number: int) -> SwarmState:
        ready.append(engine.status().ready)
        if number == 1:
            return COMPLETE
        raise TimeoutError

    look(monkeypatch, engine, tell, lambda: len(ready) > 3)
    assert ready[:4] == [False, True, True, True]
    assert "could not be read: TimeoutError" in caplog.text


def test_what_nobody_has_seen_for_long_is_forgotten(engine, monkeypatch):
    ready: list[bool] = []

    def tell(_number: int) -> SwarmState:
        if ready:
            raise TimeoutError
        ready.extend([True] * engine.status().ready)
        return COMPLETE

    monkeypatch.setattr(petals, "_KEPT_SECONDS", 0.1)
    look(monkeypatch, engine, tell, lambda: bool(ready) and not engine.status().ready)


def test_a_node_that_does_not_tell_its_room_is_there_nevertheless(engine, monkeypatch):
    async def fail(*_of_what: object) -> None:
        raise OSError("no way")

    monkeypatch.setattr(engine._rooms, "ask", fail)
    look(monkeypatch, engine, lambda _number: COMPLETE, lambda: engine.status().ready)


def test_routes_learn_of_new_nodes_before_they_need_them(engine, monkeypatch):
    """And of those that were avoided, as soon as they may be used again."""

    async def read(*_of_what: object) -> SwarmState:
        return COMPLETE

    monkeypatch.setattr(petals, "read_state", read)
    nodes = engine._nodes
    nodes.state.banned_peers.register_failure(PEER)
    asyncio.run(engine._look())
    assert not nodes._thread.trigger.is_set()
    nodes.state.banned_peers.register_success(PEER)
    asyncio.run(engine._look())
    assert nodes._thread.trigger.is_set()
    asyncio.run(engine.close())


def test_what_nodes_say_of_themselves_is_told(engine, monkeypatch):
    peer = PeerState(PEER.to_base58(), 0, 2, True, 12.5, "gaming-pc", cache_tokens_left=300, relayed=True)
    look(monkeypatch, engine, lambda _number: SwarmState(2, (peer,)), lambda: engine.status().ready)
    status = engine.status()
    assert status.num_blocks == 2
    assert status.peers == (PeerStatus(PEER.to_base58(), 0, 2, "gaming-pc", 12.5, 300, True),)
