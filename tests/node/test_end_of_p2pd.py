"""What a node says when the connections to its daemon break, which is seen before the daemon's end is."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from hivemind.utils.mpfuture import MPFuture

from petals_win.daemon.process import DaemonLost
from petals_win.node import node as node_module
from petals_win.node.node import Node, NodeSettings


def node_whose_server(raises: Exception, lost: MPFuture) -> Node:
    def run(_on_serving: object) -> None:
        raise raises

    node = Node(NodeSettings(model="any"))
    node._server = SimpleNamespace(
        dht=SimpleNamespace(lost=lost), run=run
    )  # pyright: ignore[reportAttributeAccessIssue]
    return node


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "reset"), EOFError()])
def test_it_is_the_daemon_that_was_lost(broken, monkeypatch):
    monkeypatch.setattr(node_module, "_END_OF_DAEMON_S", 60)
    lost = MPFuture()
    threading.Timer(0.2, lost.set_result, ["p2pd has ended"]).start()
    with pytest.raises(DaemonLost, match="p2pd has ended"):
        node_whose_server(broken, lost).run()


def test_the_daemon_lives(monkeypatch):
    monkeypatch.setattr(node_module, "_END_OF_DAEMON_S", 0.1)
    with pytest.raises(ConnectionResetError):
        node_whose_server(ConnectionResetError(104, "reset"), MPFuture()).run()
