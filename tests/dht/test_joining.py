"""Why a PC cannot join: sentences for peers that cannot reach it, for clocks, and for peers that are no swarm."""

from __future__ import annotations

import psutil
import pytest
from hivemind import DHT
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P

from petals_win.dht.joining import NobodyAnswers, patiently
from petals_win.errors import UserError
from petals_win.host.loop import LoopThread
from petals_win.node import node
from petals_win.node.node import Node, NodeSettings, check_reachable


def test_a_node_that_nobody_can_reach_does_not_join(monkeypatch):
    asked = {}
    for answer in (True, None, False):  # None: nobody could tell
        monkeypatch.setattr(
            node, "check_direct_reachability", lambda answer=answer, **how: asked.update(how) or answer
        )
        if answer is False:
            with pytest.raises(UserError, match="cannot reach this one.*firewall.*--internet"):
                check_reachable(["peer"], ["/ip4/0.0.0.0/tcp/5"])
        else:
            check_reachable(["peer"], ["/ip4/0.0.0.0/tcp/5"])
    assert asked["host_maddrs"] == ["/ip4/0.0.0.0/tcp/5"] and asked["use_relay"] is False


def test_what_hivemind_raises_is_a_sentence():
    assert issubclass(ValidationError, UserError)


def test_a_peer_that_is_in_no_swarm():
    """p2pd alone answers there, without the DHT of a node."""
    loop = LoopThread("p2p")
    loop.start()
    try:
        p2p = loop.call(P2P.create(nat_port_map=False), 60)
        addresses = [str(maddr) for maddr in loop.call(p2p.get_visible_maddrs(), 10)]
        with pytest.raises(UserError, match="none of them answers as a member of a swarm"):
            DHT(initial_peers=addresses, start=True)
        loop.call(p2p.shutdown(), 10)
    finally:
        loop.stop()


@pytest.mark.parametrize("silent", [0, 2, 3])
def test_a_busy_swarm_is_asked_three_times(silent):
    tries = []

    def join() -> str:
        tries.append(None)
        if len(tries) <= silent:
            raise NobodyAnswers("busy")
        return "joined"

    if silent == 3:
        with pytest.raises(NobodyAnswers):
            patiently(join)
    else:
        assert patiently(join) == "joined"
    assert len(tries) == min(silent + 1, 3)


@pytest.mark.parametrize(
    ("client_mode", "asked", "expected"), [(False, {}, 0), (True, {}, 0), (False, {"nat_port_map": True}, 1)]
)
def test_daemons_are_hidden_unless_they_are_asked_not_to_be(client_mode, asked, expected):
    dht = DHT(start=True, client_mode=client_mode, use_relay=True, **asked)
    try:
        flags = psutil.Process(dht._node.p2p._child.pid).cmdline()
        assert f"-natPortMap={expected}" in flags and f"-relayService={expected}" in flags and "-relay=1" in flags
    finally:
        dht.shutdown()


def test_the_internet_and_a_node_for_this_pc_alone_exclude_each_other(monkeypatch):
    monkeypatch.setattr(node, "stop_event", lambda: None)
    with pytest.raises(UserError, match="--internet"):
        Node(NodeSettings("SmolLM2-135M-Instruct", host="127.0.0.1", internet=True)).__enter__()
