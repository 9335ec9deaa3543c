"""Statements 51 to 53, 55, 56 and 64 of the conformance checklist: our daemon and upstream's in one swarm."""

from __future__ import annotations

import time

import pytest
from conftest import BOTH, Start
from p2pd_client import Daemon, Program, Refused

NAME = "Test.call"
TRANSPORTS = {"tcp": "/ip4/127.0.0.1/tcp/0", "quic": "/ip4/127.0.0.1/udp/0/quic-v1", "ws": "/ip4/127.0.0.1/tcp/0/ws"}
SECURITY = {"tcp": [], "quic": [], "ws": [], "noise": ["-tls=0"], "tls": ["-noise=0"]}


def echo(daemon: Daemon) -> None:
    handler = daemon.persistent()
    assert handler.add(NAME).done
    handler.serve(lambda call: call.data)


def calls_pass(caller: Daemon, callee: Daemon) -> bool:
    return caller.persistent().call(callee.peer_id, NAME, b"hello" * 1000).answer == {1: [b"hello" * 1000]}


# Statement 64 is that these pass with a daemon built for Windows, too.
with_windows = pytest.mark.parametrize("program", [*BOTH, "windows"], indirect=True)


@with_windows
@pytest.mark.parametrize("how", SECURITY)
def test_51_calls_both_ways(program: Program, other: Program, start: Start, how: str) -> None:
    listen = TRANSPORTS.get(how, TRANSPORTS["tcp"])
    # Noise alone or TLS alone at one end, both at the other.
    tested, peer = start(program, *SECURITY[how], listen=listen), start(other, listen=listen)
    echo(tested)
    echo(peer)
    tested.connect_to(peer)
    assert calls_pass(tested, peer)  # the dialled one answers
    assert calls_pass(peer, tested)  # and the dialling one
    again, caller = start(program, *SECURITY[how], listen=listen), start(other, listen=listen)
    echo(again)
    caller.connect_to(again)  # now the other one dials
    assert calls_pass(caller, again)


@with_windows
@pytest.mark.parametrize("middle", ["tested", "other"])
def test_52_53_the_only_bootstrap_node(program: Program, other: Program, start: Start, middle: str) -> None:
    first = start(program if middle == "tested" else other)
    members = other if middle == "tested" else program
    join = ["-b=1", f"-bootstrapPeers={first.full_addresses()[0]}"]
    caller, callee = start(members, *join), start(members, *join)
    echo(callee)
    persistent = caller.persistent()
    deadline = time.monotonic() + 60
    while (reply := persistent.call(callee.peer_id, NAME, b"hello")).error:
        assert time.monotonic() < deadline, reply.error
        time.sleep(0.5)
    assert reply.answer == {1: [b"hello"]}
    assert callee.peer_id in [peer for peer, _ in caller.peers()]


def speaks(tested: Daemon, peer: Daemon, protocol: str) -> bool:
    """Whether the daemon under test accepts streams of a protocol."""
    try:
        stream, _ = peer.open_stream(tested.peer_id, protocol)
    except Refused:
        return False
    stream.close()
    return True


@pytest.mark.parametrize(
    ("mode", "serves"),
    [("-dhtServer=1", True), ("-dhtClient=1", False), ("-dht=1", False), ("-dht=1 -forceReachabilityPublic=1", True)],
)
def test_55_dht_modes(program: Program, other: Program, start: Start, mode: str, serves: bool) -> None:
    tested, peer = start(program, *mode.split(), dht=None), start(other)
    peer.connect_to(tested)
    deadline = time.monotonic() + 60
    while speaks(tested, peer, "/ipfs/kad/1.0.0") != serves:  # reachability is told within the daemon
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("on", [True, False])
def test_56_autonat(program: Program, other: Program, start: Start, on: bool) -> None:
    tested, peer = start(program, f"-autonat={int(on)}"), start(other)
    peer.connect_to(tested)
    assert speaks(tested, peer, "/libp2p/autonat/1.0.0") == on
