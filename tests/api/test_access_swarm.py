"""GET /v1/swarm and its events."""

from __future__ import annotations

import json
from contextlib import ExitStack

import httpx
import pytest

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.api import swarm


def events(response: httpx.Response):
    """The states that a stream of events sends."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(swarm, "LOOK_S", 0.05)


def listening(served: Served):
    return httpx.stream("GET", f"{served.url}/v1/swarm/events", timeout=30)


def test_every_block_with_its_servers():
    with serving(FakeEngine(missing_blocks=tuple(range(15, 30)))) as served:
        response = httpx.get(f"{served.url}/v1/swarm")
    assert response.status_code == 200, "the question is answered, though the swarm is not ready"
    state = response.json()
    assert (state["object"], state["model"], state["ready"], state["num_blocks"]) == ("swarm", MODEL, False, 30)
    assert state["missing_blocks"] == list(range(15, 30))
    assert [block["block"] for block in state["blocks"]] == list(range(30))
    assert [block["missing"] for block in state["blocks"]] == [False] * 15 + [True] * 15
    assert [block["peer_ids"] for block in state["blocks"]] == [["12D3KooWFakePeer"]] * 15 + [[]] * 15
    [peer] = state["peers"]
    assert (peer["name"], peer["start_block"], peer["end_block"]) == ("gaming-pc", 0, 15)
    assert (peer["throughput"], peer["cache_tokens_left"], peer["relayed"]) == (123.5, 4096, False)


def test_the_state_comes_at_once_and_whenever_it_changes():
    with serving() as served, listening(served) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        states = events(response)
        first = next(states)
        assert first == httpx.get(f"{served.url}/v1/swarm").json()
        served.engine.missing_blocks = (20, 21)
        second = next(states)
        assert (second["ready"], second["missing_blocks"]) == (False, [20, 21])
        served.engine.missing_blocks = ()
        assert next(states) == first


def test_what_does_not_change_is_not_sent_again(monkeypatch):
    with serving() as served, listening(served) as response:
        states = events(response)
        next(states)
        asked = 0
        status = served.engine.status

        def count():
            nonlocal asked
            asked += 1
            return status()

        monkeypatch.setattr(served.engine, "status", count)
        assert eventually(lambda: asked > 5)
        served.engine.missing_blocks = (7,)
        assert next(states)["missing_blocks"] == [7], "and nothing before it"


def test_listeners_are_few_and_make_room_when_they_go(monkeypatch):
    monkeypatch.setattr(swarm, "MOST_LISTENERS", 2)
    with serving() as served:
        with ExitStack() as listeners:
            streams = [events(listeners.enter_context(listening(served))) for _ in range(2)]
            assert all(next(states)["ready"] for states in streams)
            refused = httpx.get(f"{served.url}/v1/swarm/events")
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert "Ask for /v1/swarm" in refused.json()["error"]["message"]
        with ExitStack() as listeners:

            def let_in() -> bool:
                response = listeners.enter_context(listening(served))
                return response.status_code == 200

            assert eventually(let_in)


def test_listeners_do_not_keep_the_server():
    with serving() as served, listening(served) as response:
        states = events(response)
        next(states)
        served.api.stop()
        assert list(states) == []


def test_it_needs_the_key():
    with serving(api_keys=("key",)) as served:
        for path in ("/v1/swarm", "/v1/swarm/events"):
            assert httpx.get(served.url + path).status_code == 401
