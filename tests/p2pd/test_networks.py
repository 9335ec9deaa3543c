"""Statements 54 and 57 to 59 of the conformance checklist, and homes behind two routers: networks beyond loopback.

Unix sockets are files: the test drives daemons in other network namespaces through them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import p2pd_wire as wire
import pytest
from conftest import Start, resolve
from p2pd_client import Daemon, Program
from p2pd_networks import Networks, NoNetworks

NAME = "Test.call"
PEERS = 20


def serve_echo(daemon: Daemon) -> None:
    handler = daemon.persistent()
    assert handler.add(NAME).done
    handler.serve(lambda call: call.data)


def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture
def networks() -> Iterator[Networks]:
    try:
        made = Networks()
    except NoNetworks as e:
        pytest.skip(str(e))
    with made:
        yield made


# -- one cable: none of the exemptions for loopback holds ----------------------------------------------------------


@dataclass
class Cable:
    """Two computers with one address each."""

    here: list[str]
    there: list[str]


@pytest.fixture
def cable(networks: Networks) -> Cable:
    try:
        here, there = networks.namespace("here"), networks.namespace("there")
        networks.cable(here, "10.77.0.1/24", there, "10.77.0.2/24")
    except NoNetworks as e:
        pytest.skip(str(e))
    return Cable(networks.inside(here), networks.inside(there))


def peers_there(reference: Program, start: Start, cable: Cable, *args: str) -> list[Daemon]:
    listen = "/ip4/10.77.0.2/tcp/0"
    started = [start(reference, *args, prefix=cable.there, listen=listen, ready=False) for _ in range(PEERS)]
    for peer in started:
        peer.wait_ready()
    return started


@pytest.mark.parametrize("name", ["ours", "reference"])
def test_58_twenty_peers_of_one_address_come(
    name: str, reference: Program, start: Start, cable: Cable, request: pytest.FixtureRequest
) -> None:
    tested = start(resolve(name, request), "-connManager=1", prefix=cable.here, listen="/ip4/10.77.0.1/tcp/4001")
    peers = peers_there(reference, start, cable, "-b=1", f"-bootstrapPeers={tested.full_addresses()[0]}")
    everybody = {peer.peer_id for peer in peers}
    until(lambda: {peer for peer, _ in tested.peers()} == everybody, 60, "some were not let in")
    time.sleep(3)
    assert {peer for peer, _ in tested.peers()} == everybody
    assert all(tested.peer_id in [peer for peer, _ in daemon.peers()] for daemon in peers)


@pytest.mark.parametrize("name", ["ours", "reference"])
def test_58_twenty_peers_of_one_address_are_dialled(
    name: str, reference: Program, start: Start, cable: Cable, request: pytest.FixtureRequest
) -> None:
    tested = start(resolve(name, request), "-connManager=1", prefix=cable.here, listen="/ip4/10.77.0.1/tcp/4001")
    peers = peers_there(reference, start, cable)
    began = time.monotonic()
    for peer in peers:
        tested.connect_to(peer)
    assert time.monotonic() - began < 40  # one more every five seconds, after eight, would take longer
    time.sleep(1)
    assert {peer for peer, _ in tested.peers()} == {peer.peer_id for peer in peers}


@pytest.mark.parametrize("name", ["ours", "reference"])
def test_59_thirty_handlers_in_a_row(
    name: str, reference: Program, start: Start, cable: Cable, request: pytest.FixtureRequest
) -> None:
    tested = start(resolve(name, request), prefix=cable.here, listen="/ip4/10.77.0.1/tcp/4001")
    peer = start(reference, prefix=cable.there, listen="/ip4/10.77.0.2/tcp/4001")
    tested.connect_to(peer)
    time.sleep(1)  # identify is done: what comes now comes as pushes, of which only some are heard
    handler = peer.persistent()
    handler.serve(lambda call: call.protocol.encode())
    for n in range(30):
        assert handler.add(f"Test.call{n}").done
    caller = tested.persistent()
    for n in (29, 15, 0):
        assert caller.call(peer.peer_id, f"Test.call{n}").answer == {1: [f"Test.call{n}".encode()]}


# -- relays --------------------------------------------------------------------------------------------------------

HOP = "/libp2p/circuit/relay/0.2.0/hop"
RESERVE, STATUS, OK = 0, 2, 100


def test_57_reservations_have_the_limits_asked_for(our: Program, reference: Program, start: Start) -> None:
    limits = {"-relayDataLimit=123456789": 123456789, "-relayTimeLimit=7m": 7 * 60}
    for flags, (data, seconds) in (((), (4 << 30, 30 * 60)), (tuple(limits), (123456789, 420))):
        relay, client = start(our, *flags), start(reference)
        client.connect_to(relay)
        stream, _ = client.open_stream(relay.peer_id, HOP)
        stream.send(wire.message((1, RESERVE)))
        status = wire.parse(stream.receive())
        assert (status[1], status[5]) == ([STATUS], [OK])
        assert wire.parse(status[4][0]) == {1: [seconds], 2: [data]}


@dataclass
class Homes:
    """Two homes, each behind its own router, and a computer with a public address."""

    relay: list[str]
    left: list[str]
    right: list[str]


@pytest.fixture
def homes(networks: Networks) -> Homes:
    # Public ranges, since relays on private addresses are not announced. No packet leaves these namespaces.
    try:
        internet = networks.namespace("internet")
        networks.forward(internet)
        relay = networks.namespace("relay")
        networks.cable(internet, "5.1.1.1/24", relay, "5.1.1.2/24")
        networks.default_route(relay, "5.1.1.1")
        inside = []
        for number, name in ((2, "left"), (3, "right")):
            router, pc = networks.namespace(f"{name}-router"), networks.namespace(name)
            networks.cable(internet, f"5.1.{number}.1/24", router, f"5.1.{number}.2/24")
            networks.default_route(router, f"5.1.{number}.1")
            networks.cable(router, f"192.168.{number}.1/24", pc, f"192.168.{number}.2/24")
            networks.default_route(pc, f"192.168.{number}.1")
            networks.translate(router, f"192.168.{number}.0/24")
            inside.append(networks.inside(pc))
    except NoNetworks as e:
        pytest.skip(str(e))
    return Homes(networks.inside(relay), *inside)


class Relayed:
    """A relay, and two peers that know nobody else."""

    def __init__(
        self,
        homes: Homes,
        start: Start,
        relay: Program,
        left: Program,
        right: Program,
        *args: str,
        transport: str = "tcp/4001",
    ) -> None:
        self.relay = start(
            relay,
            "-forceReachabilityPublic=1",
            "-relayService=1",
            prefix=homes.relay,
            listen=f"/ip4/5.1.1.2/{transport}",
        )
        address = self.relay.full_addresses()[0]
        join = [
            "-b=1", f"-bootstrapPeers={address}", "-autoRelay=1", "-relayDiscovery=0", f"-trustedRelays={address}",
            "-forceReachabilityPrivate=1", *args,
        ]  # fmt: skip
        listen = f"/ip4/0.0.0.0/{transport}"
        self.left = _joined(start, left, *join, prefix=homes.left, listen=listen)
        self.right = _joined(start, right, *join, prefix=homes.right, listen=listen)
        for peer in (self.left, self.right):
            until(lambda peer=peer: any("/p2p-circuit" in a for a in peer.identify()[1]), 30, "no reservation")
        serve_echo(self.left)
        serve_echo(self.right)


def _joined(start: Start, program: Program, *args: str, **more: Any) -> Daemon:
    """A daemon that has joined the swarm at its relay.

    Upstream's ends if its first attempt fails, as it does when the home's router still knows the last test's connection between
    the same two ports.
    """
    try:
        return start(program, *args, **more)
    except AssertionError as e:
        if "failed to connect to bootstrap peers" not in str(e):
            raise
        time.sleep(1)
        return start(program, *args, **more)


def ways(caller: Daemon, callee: Daemon) -> list[str]:
    """The addresses of the caller's connections to the callee."""
    return [address for peer, address in caller.peers() if peer == callee.peer_id]


def call_until_found(caller: Daemon, callee: Daemon, data: bytes) -> None:
    """A call by peer ID alone. The addresses are in the DHT a moment after the reservation."""
    persistent = caller.persistent()
    deadline = time.monotonic() + 40
    while (reply := persistent.call(callee.peer_id, NAME, data, 30)).error:
        assert time.monotonic() < deadline, reply.error
        time.sleep(0.5)
    assert reply.answer == {1: [data]}


def answers(where: list[str], address: str) -> bool:
    """Whether a TCP connection from there to the daemons' port can be made."""
    script = f"import socket; socket.create_connection(({address!r}, 4001), 3)"
    return subprocess.run([*where, sys.executable, "-c", script], capture_output=True, timeout=30).returncode == 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("relay", "left", "right"),
    [
        pytest.param("ours", "ours", "ours", id="ours alone"),
        pytest.param("reference", "ours", "ours", id="behind upstream's relay"),
        pytest.param("ours", "reference", "ours", id="with upstream's peer"),
        pytest.param("reference", "ours", "reference", id="in upstream's swarm"),
    ],
)
def test_54_two_homes_through_a_relay(
    relay: str, left: str, right: str, homes: Homes, start: Start, request: pytest.FixtureRequest
) -> None:
    swarm = Relayed(homes, start, *(resolve(name, request) for name in (relay, left, right)))
    for address in ("5.1.3.2", "192.168.3.2"):  # there is no way from one home into the other
        assert not answers(homes.left, address)
    assert answers(homes.left, "5.1.1.2")
    for caller, callee in ((swarm.left, swarm.right), (swarm.right, swarm.left)):
        call_until_found(caller, callee, bytes(4096))
        assert ways(caller, callee) and all("/p2p-circuit" in a for a in ways(caller, callee))
    if relay == "ours":  # upstream's relay cuts a connection off after 128 KiB
        answer = swarm.left.persistent().call(swarm.right.peer_id, NAME, bytes(2 << 20), 30).answer
        assert answer == {1: [bytes(2 << 20)]}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("transport", ["tcp/4001", "udp/4001/quic-v1"])
def test_two_homes_become_direct(transport: str, homes: Homes, start: Start, ours: Program) -> None:
    """DCUtR, by routers that let in nothing but answers. The homes meet before either knows its public address."""
    swarm = Relayed(homes, start, ours, ours, ours, "-autonat=1", transport=transport)
    call_until_found(swarm.left, swarm.right, bytes(4096))
    until(lambda: f"/ip4/5.1.3.2/{transport}" in ways(swarm.left, swarm.right), 30, "no direct connection")
    assert f"/ip4/5.1.2.2/{transport}" in ways(swarm.right, swarm.left)
    swarm.relay.kill()
    call_until_found(swarm.left, swarm.right, bytes(4096))
