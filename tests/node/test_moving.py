"""A node that moves to other blocks: the old ones are out of memory before the new ones are loaded, whoever has a session there."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from nodes_here import nodes_here
from petals.server.server import Server
from petals.utils.auto_config import AutoDistributedModelForCausalLM

from petals_win.node import server as server_room


@pytest.fixture
def move(monkeypatch) -> threading.Event:
    """When it is set, other blocks are needed more."""
    wanted = threading.Event()

    def wait(server: Server) -> None:
        while not server.stop.wait(0.02):
            if wanted.is_set():
                wanted.clear()
                return

    monkeypatch.setattr(Server, "_wait_until_others_are_better", wait)
    return wanted


@pytest.fixture
def loads(monkeypatch) -> list[list[bool]]:
    """At each load, of which of the spans loaded before there is anything left."""
    load, spans, found = Server._load, list[weakref.ref](), list[list[bool]]()

    def loading(server: Server, start: int, end: int) -> Any:
        found.append([span() is not None for span in spans])
        container = load(server, start, end)
        spans.append(weakref.ref(container.service.span))
        return container

    monkeypatch.setattr(Server, "_load", loading)
    return found


def test_the_old_blocks_are_gone_first(checkpoint, move, loads):
    folder = checkpoint("llama")
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with nodes_here(folder, ["0:4"]) as (node,):
        remote: Any = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=[node.peer], show_route=False, max_retries=5
        )
        try:
            with torch.inference_mode(), remote.inference_session(max_length=20) as session:
                expected = session.step(hidden)
            with torch.inference_mode(), remote.inference_session(max_length=20) as session:
                first = session.step(hidden[:, :4])
                move.set()
                while len(loads) < 2 or node.server.container is None:
                    assert node.thread.is_alive()
                    node.thread.join(0.02)
                rest = session.step(hidden[:, 4:])
            torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, atol=1e-5, rtol=1e-5)
        finally:
            remote.blocks.sequence_manager.shutdown()
            remote.blocks.sequence_manager.dht.shutdown()
    assert loads == [[], [False]]


def test_what_a_card_keeps_for_later_is_freed_too(monkeypatch):
    done = []
    server = Server.__new__(Server)
    server._ended, server.stop, server.container = threading.Event(), threading.Event(), None
    server._device = torch.device("cuda", 0)
    monkeypatch.setattr(server_room.torch.cuda, "empty_cache", lambda: done.append("freed"))

    class Container:
        blocks = "0:1"

        def shutdown(self) -> None:
            done.append("left")

    def load(start: int, end: int) -> Any:
        done.append("loaded")
        if done.count("loaded") == 2:
            server.stop.set()
        return Container()

    monkeypatch.setattr(server, "_choose_blocks", lambda: (0, 1))
    monkeypatch.setattr(server, "_load", load)
    monkeypatch.setattr(server, "_wait_until_others_are_better", lambda: None)
    server.run()
    assert done == ["loaded", "left", "freed", "loaded", "left"]
