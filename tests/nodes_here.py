"""A real swarm inside of the test's own process: nodes on loopback, with p2pd, whose budgets a test can make small."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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


@contextlib.contextmanager
def nodes_here(folder: Path, spans: Sequence[str]) -> Iterator[list[NodeHere]]:
    """Serve the spans, such as "0:2", of the model in `folder`; all nodes are ready."""
    source = open_model(str(folder))
    with contextlib.ExitStack() as ends:
        # uvloop is for one loop that starts processes, and here each DHT has one of its own.
        ends.enter_context(mock.patch.dict(sys.modules, {"uvloop": None}))
        nodes: list[NodeHere] = []
        for span in spans:
            server = Server(
                initial_peers=[node.peer for node in nodes],
                dht_prefix=source.dht_prefix,
                converted_model_name_or_path=str(folder),
                throughput=1.0,
                block_indices=span,
                device="cpu",
                inference_max_length=source.context_length,
                update_period=1,
                expiration=30,
                host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                reachable_via_relay=False,
                use_relay=False,
                use_auto_relay=False,
            )
            thread = threading.Thread(target=server.run, name=f"node {span}", daemon=True)
            ends.callback(thread.join, 30)
            ends.callback(server.shutdown)
            thread.start()
            nodes.append(NodeHere(server, thread))
            while server.container is None:
                assert thread.is_alive(), f"the node {span} ended"
                thread.join(0.02)
        yield nodes
