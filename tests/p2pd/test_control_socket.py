"""Statements 1 to 10 of the conformance checklist: the control socket before any upgrade."""

from __future__ import annotations

import os
import time

import p2pd_wire as wire
import pytest
from conftest import Start
from p2pd_client import Closed, Daemon, Program, Refused, open_socket

LIMIT = 4 << 20


def padded_identify(length: int) -> bytes:
    """An IDENTIFY request of exactly this length: unknown fields are allowed."""
    head = wire.request(wire.IDENTIFY)
    filler = length - len(head)
    for overhead in range(2, 8):
        field = wire.message((99, bytes(filler - overhead)))
        if len(field) == filler:
            return head + field
    raise AssertionError("no such length")


def test_01_frames_are_varint_and_protobuf(daemon: Daemon) -> None:
    with daemon.connect() as connection:
        connection.sock.sendall(wire.frame(wire.request(wire.UPGRADE)))
        assert connection.take(3) == wire.OK_FRAME


def test_02_limit_is_accepted_and_one_more_closes(daemon: Daemon) -> None:
    with daemon.connect() as connection:
        connection.send(padded_identify(LIMIT))
        assert connection.reply()[1] == [0]
        connection.sock.sendall(wire.varint(LIMIT + 1))
        assert connection.is_closed()


def test_02_limit_after_the_upgrade(daemon: Daemon) -> None:
    persistent = daemon.persistent()
    call_id = os.urandom(16)
    head = wire.message((1, call_id), (wire.REMOVE_UNARY, wire.message((1, "nobody"))))
    filler = LIMIT - len(head) - len(wire.message((99, bytes(LIMIT)))) + LIMIT
    exact = head + wire.message((99, bytes(filler)))
    assert len(exact) == LIMIT
    persistent.connection.send(exact)
    assert persistent.wait(call_id).error
    persistent.connection.sock.sendall(wire.varint(LIMIT + 1))
    assert persistent.ended.wait(20)


def test_02_limit_is_the_flag(program: Program, start: Start) -> None:
    daemon = start(program, "-persistentConnMaxMsgSize=1000")
    with daemon.connect() as connection:
        connection.send(padded_identify(1000))
        assert connection.reply()[1] == [0]
        connection.send(padded_identify(1001))
        assert connection.is_closed()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(wire.message((1, 11)), id="unknown-type"),
        pytest.param(b"", id="empty"),
        pytest.param(wire.message((2, b"x")), id="no-type"),
        pytest.param(b"\xff\xff\xff\xff", id="garbage"),
        pytest.param(wire.request(wire.CONNECT, b""), id="connect-without-peer"),
        pytest.param(
            wire.request(wire.STREAM_HANDLER, wire.message((1, b"a"), (2, "p"))), id="handler-without-balanced"
        ),
    ],
)
def test_03_what_cannot_be_understood_closes(daemon: Daemon, payload: bytes) -> None:
    with daemon.connect() as connection:
        connection.send(payload)
        assert connection.is_closed()
    assert daemon.identify()[0] == daemon.peer_id


def test_03_huge_length_closes_without_memory(daemon: Daemon) -> None:
    with daemon.connect() as connection:
        connection.sock.sendall(wire.varint(1 << 40))
        assert connection.is_closed()
    assert daemon.identify()[0] == daemon.peer_id


def test_04_several_requests_are_answered_in_order(daemon: Daemon) -> None:
    with daemon.connect() as connection:
        for _ in range(10):
            connection.send(wire.request(wire.IDENTIFY))
            connection.send(wire.request(wire.CONNECT))
        for _ in range(10):
            assert wire.one(connection.reply(), 4, 1) == daemon.peer_id
            with pytest.raises(Refused):
                connection.reply()


@pytest.mark.parametrize(
    "kind",
    [
        wire.CONNECT,
        wire.STREAM_OPEN,
        wire.STREAM_HANDLER,
        wire.DHT,
        wire.DISCONNECT,
        wire.REMOVE_STREAM_HANDLER,
        wire.CONNMANAGER,
        wire.PUBSUB,
    ],
)
def test_05_missing_parameters_are_an_error(daemon: Daemon, kind: int) -> None:
    with daemon.connect() as connection:
        with pytest.raises(Refused, match="."):
            connection.ask(kind)
        assert wire.one(connection.ask(wire.IDENTIFY), 4, 1) == daemon.peer_id


def test_06_identify(program: Program, start: Start) -> None:
    daemon = start(program, listen="/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.1/udp/0/quic-v1,/ip4/127.0.0.1/tcp/0/ws")
    peer_id, addresses = daemon.identify()  # raises for an address that hivemind cannot print
    assert peer_id == daemon.peer_id
    assert peer_id.startswith(bytes.fromhex("0024080112 20"))
    kinds = sorted(wire.address_text(wire.address(a)).split("/", 5)[-1] for a in addresses)
    assert len(kinds) == 3 and not any("/p2p/" in a for a in addresses)
    assert sum("/tcp/" in a for a in addresses) == 2 and sum(a.endswith("/quic-v1") for a in addresses) == 1


def test_07_list_peers(pair: tuple[Daemon, Daemon]) -> None:
    tested, peer = pair
    assert tested.peers() == [(peer.peer_id, peer.identify()[1][0])]


def test_08_connect_finds_the_peer_by_dht(program: Program, other: Program, start: Start) -> None:
    first = start(other)
    join = ["-b=1", f"-bootstrapPeers={first.full_addresses()[0]}"]
    tested, target = start(program, *join), start(other, *join)
    deadline = time.monotonic() + 60
    while True:  # the peer in the middle hears of the target a moment after the target is ready
        try:
            tested.ask(wire.CONNECT, wire.message((1, target.peer_id)))
            break
        except Refused:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    assert target.peer_id in [peer for peer, _ in tested.peers()]


def test_08_unknown_peer_is_an_error(program: Program, other: Program, start: Start) -> None:
    first = start(other)
    tested = start(program, "-b=1", f"-bootstrapPeers={first.full_addresses()[0]}")
    stranger = bytes.fromhex("0024080112 20") + os.urandom(32)
    began = time.monotonic()
    with pytest.raises(Refused):
        tested.ask(wire.CONNECT, wire.message((1, stranger)))
    assert time.monotonic() - began < 30


def test_08_address_is_used(pair: tuple[Daemon, Daemon]) -> None:
    tested, peer = pair
    tested.connect_to(peer)  # again: nothing happens
    assert len(tested.peers()) == 1


def test_09_disconnect(pair: tuple[Daemon, Daemon]) -> None:
    tested, peer = pair
    deadline = time.monotonic() + 60
    while tested.peers():  # the DHT gets to know a new peer, and dials it again for that
        assert time.monotonic() < deadline
        tested.ask(wire.DISCONNECT, wire.message((1, peer.peer_id)))
    tested.ask(wire.DISCONNECT, wire.message((1, peer.peer_id)))


@pytest.mark.parametrize("kind", range(9))
def test_10_dht_requests_are_answered(pair: tuple[Daemon, Daemon], kind: int) -> None:
    tested, peer = pair
    key = b"/v/key"
    parameters = wire.message((1, kind), (2, peer.peer_id), (3, b"\x01\x55\x00\x01a"), (4, key), (5, b"value"), (7, 3))
    with tested.connect() as connection:
        try:
            reply = connection.ask(wire.DHT, parameters)
        except Refused as e:
            assert str(e)
            return
        if kind == 0:
            assert wire.one(reply, 5, 2, 1) == peer.peer_id
        if 5 in reply and wire.one(reply, 5, 1) == 0:
            while wire.parse(connection.receive())[1] != [2]:
                pass


def test_10_closest_peers_come_one_by_one(pair: tuple[Daemon, Daemon]) -> None:
    tested, peer = pair
    deadline = time.monotonic() + 60
    while True:  # the routing table fills after identify
        with tested.connect() as connection:
            try:
                reply = connection.ask(wire.DHT, wire.message((1, 3), (4, peer.peer_id)))
            except Refused:
                assert time.monotonic() < deadline
                time.sleep(0.1)
                continue
            assert wire.one(reply, 5, 1) == 0
            messages = [wire.parse(connection.receive())]
            while messages[-1][1] != [2]:
                messages.append(wire.parse(connection.receive()))
            assert [m[3][0] for m in messages[:-1]] == [peer.peer_id]
            return


def test_10_without_dht_it_is_an_error(program: Program, start: Start) -> None:
    with pytest.raises(Refused):
        start(program, dht=None).ask(wire.DHT, wire.message((1, 0), (2, bytes.fromhex("00020001"))))


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(wire.request(wire.CONNMANAGER, wire.message((1, 0), (2, b"x"), (3, "tag"), (4, 1))), id="tag"),
        pytest.param(wire.request(wire.CONNMANAGER, wire.message((1, 2))), id="trim"),
        pytest.param(wire.request(wire.PUBSUB, wire.message((1, 0))), id="topics"),
        pytest.param(wire.request(wire.PUBSUB, wire.message((1, 3), (2, "topic"))), id="subscribe"),
    ],
)
def test_10_what_hivemind_does_not_use_is_answered(daemon: Daemon, request_bytes: bytes) -> None:
    with daemon.connect() as connection:
        connection.send(request_bytes)
        assert wire.parse(connection.receive())[1][0] in (0, 1)


def test_secret_opens_every_tcp_connection(ours_tcp: Daemon) -> None:
    assert ours_tcp.secret is not None
    for opening in (
        b"",
        b"0" * 64,
        ours_tcp.secret[:-1].encode() + b"!",
        wire.frame(wire.request(wire.IDENTIFY)) * 30,
    ):
        sock = open_socket(ours_tcp.control)
        with sock:
            sock.sendall(opening)
            if len(opening) < 64:
                continue
            with pytest.raises((Closed, ConnectionError)):
                if sock.recv(1) == b"":
                    raise Closed
    assert ours_tcp.identify()[0] == ours_tcp.peer_id

    def refused() -> int:
        return sum("refused a control connection" in line for line in ours_tcp.lines)

    deadline = time.monotonic() + 30  # of a busy machine, to read them
    while refused() < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert refused() >= 3


def test_secret_is_waited_for_ten_seconds_at_most(ours_tcp: Daemon) -> None:
    with open_socket(ours_tcp.control) as sock:
        began = time.monotonic()
        assert sock.recv(1) == b""
        assert 8 < time.monotonic() - began < 30


@pytest.fixture
def ours_tcp(our_program: str, start: Start) -> Daemon:
    return start(Program("ours-tcp", (our_program,), speaks_secret=True, tcp=True))
