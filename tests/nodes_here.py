"""A real swarm inside of the test's own process: nodes on loopback, with p2pd, whose budgets a test can make small."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from petals.server.server import Server

from petals_win.models.source import open_model
from petals_win.node.budget import CacheBudget
from petals_win.node.service import BlockService


@dataclass
class NodeHere:
    server: Server
    thread: threading.Thread

    @property
    def peer(self) -> str:
        return str(self.server.dht.get_visible_maddrs()[0])

    @property
    def service(self) -> BlockService:
        assert self.server.container is not None
        return self.server.container.service

    @property
    def budget(self) -> CacheBudget:
        return self.service.budget

    def make_room_for(self, tokens: int) -> None:
        """Give the node memory for so many tokens of all sessions together, as if it had no more."""
        self.budget.total_bytes = tokens * self.service.span.cache_bytes_per_token

    def end(self) -> None:
        """Leave the swarm as a node does that is told to end."""
        self.server.shutdown()
        self.thread.join(30)


def node_here(folder: Path, peers: Sequence[str], **settings: Any) -> NodeHere:
    """Join the swarm of `peers`, and begin to serve; `settings` are those of petals_win.node.settings."""
    source = open_model(str(folder))
    server = Server(
        **{
            "initial_peers": peers,
            "dht_prefix": source.dht_prefix,
            "converted_model_name_or_path": str(folder),
            "throughput": 1.0,
            "device": "cpu",
            "inference_max_length": source.context_length,
            "update_period": 1,
            "expiration": 30,
            "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
            "reachable_via_relay": False,
            "use_relay": False,
            "use_auto_relay": False,
            **settings,
        }
    )
    name = f"node {settings.get('block_indices', 'anywhere')}"
    thread = threading.Thread(target=server.run, name=name, daemon=True)
    thread.start()
    node = NodeHere(server, thread)
    while server.container is None:
        if not thread.is_alive():
            node.end()
            raise AssertionError(f"the {name} ended")
        thread.join(0.02)
    return node


def without_uvloop() -> AbstractContextManager[object]:
    """It is for one loop that starts processes, and here each DHT has one of its own."""
    return mock.patch.dict(sys.modules, {"uvloop": None})


@contextlib.contextmanager
def nodes_here(folder: Path, spans: Sequence[str]) -> Iterator[list[NodeHere]]:
    """Serve the spans, such as "0:2", of the model in `folder`; all nodes are ready."""
    with contextlib.ExitStack() as ends:
        ends.enter_context(without_uvloop())
        nodes: list[NodeHere] = []
        for span in spans:
            nodes.append(node_here(folder, [node.peer for node in nodes], block_indices=span))
            ends.callback(nodes[-1].end)
        yield nodes
