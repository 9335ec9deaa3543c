"""Statements 43 to 49 of the conformance checklist: raw streams and their handlers."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import threading
import time
from pathlib import Path

import p2pd_wire as wire
import pytest
from conftest import Start
from p2pd_client import Connection, Daemon, Listener, Program, Refused

Pair = tuple[Daemon, Daemon]
LARGE = 30 << 20


@pytest.fixture(params=["opens", "is opened to"])
def both(pair: Pair, request: pytest.FixtureRequest) -> Pair:
    """The opener's daemon and the handler's: the one under test in either role."""
    tested, peer = pair
    return (tested, peer) if request.param == "opens" else (peer, tested)


def test_43_the_first_supported_protocol(both: Pair, sockets: Path) -> None:
    opening, serving = both
    with Listener(serving, sockets) as listener:
        serving.add_handler(listener, "s1", "s2")
        stream, info = opening.open_stream(serving.peer_id, "nope", "s2", "s1")
        assert info[1] == [serving.peer_id] and info[3] == [b"s2"]
        assert wire.address_text(info[2][0]) in [a for _, a in opening.peers()]
        inner, _ = listener.accept()
        stream.sock.sendall(b"raw\x00bytes")
        assert inner.take(9) == b"raw\x00bytes"
        inner.sock.sendall(b"back")
        assert stream.take(4) == b"back"


def test_43_failure_leaves_the_connection(pair: Pair) -> None:
    tested, peer = pair
    with tested.connect() as connection:
        for protocols in (["nope"], []):
            with pytest.raises(Refused):
                connection.ask(wire.STREAM_OPEN, wire.with_protocols(peer.peer_id, protocols))
        with pytest.raises(Refused):
            connection.ask(wire.STREAM_OPEN, wire.with_protocols(b"not a peer", ["s"]))
        assert wire.one(connection.ask(wire.IDENTIFY), 4, 1) == tested.peer_id


@pytest.mark.parametrize("tcp", [False, True], ids=["usual", "tcp"])
def test_44_45_the_handler_is_told_at_once(both: Pair, sockets: Path, tcp: bool) -> None:
    opening, serving = both
    with Listener(serving, sockets, tcp=tcp) as listener:
        serving.add_handler(listener, "s")
        stream, _ = opening.open_stream(serving.peer_id, "s")
        inner, info = listener.accept()  # though nothing has been sent yet
        assert info[1] == [opening.peer_id] and info[3] == [b"s"]
        assert wire.address_text(info[2][0]) in [a for _, a in serving.peers()]
        stream.sock.sendall(b"first")
        assert inner.take(5) == b"first"


def digest_of(connection: Connection) -> str:
    return hashlib.sha256(connection.take_all()).hexdigest()


@pytest.mark.wine_lacks("the sure end of a socket that its process has closed")
def test_46_large_streams_arrive_whole(both: Pair, sockets: Path) -> None:
    opening, serving = both
    data = os.urandom(LARGE)
    expected = hashlib.sha256(data).hexdigest()
    with Listener(serving, sockets) as listener:
        serving.add_handler(listener, "s")
        for direction in ("there", "back"):
            stream, _ = opening.open_stream(serving.peer_id, "s")
            inner, _ = listener.accept()
            source, sink = (stream, inner) if direction == "there" else (inner, stream)

            def send(source: Connection = source) -> None:
                source.sock.sendall(data)
                source.close()

            sender = threading.Thread(target=send)
            sender.start()
            assert digest_of(sink) == expected, direction
            sink.close()
            sender.join(60)


@pytest.mark.parametrize("who", ["opener", "handler"])
def test_47_close_reaches_the_other_side(both: Pair, sockets: Path, who: str) -> None:
    opening, serving = both
    with Listener(serving, sockets) as listener:
        serving.add_handler(listener, "s")
        stream, _ = opening.open_stream(serving.peer_id, "s")
        inner, _ = listener.accept()
        closing, seeing = (stream, inner) if who == "opener" else (inner, stream)
        closes_at = opening if who == "opener" else serving
        closing.sock.sendall(b"last words")
        heard = b""
        if closes_at.program.name == "reference":
            # It may reset a stream whose own side is closed, and a reset overtakes what has not been read.
            heard = seeing.take(len(b"last words"))
        closing.close()
        assert heard + seeing.take_all() == b"last words"


@pytest.mark.skipif(os.name == "nt", reason="closing a TCP socket with unread input destroys what it has sent")
def test_47_the_last_words_of_a_handler_that_leaves_input_unread(ours: Program, start: Start, sockets: Path) -> None:
    opening, serving = start(ours), start(ours)
    opening.connect_to(serving)
    with Listener(serving, sockets) as listener:
        serving.add_handler(listener, "s")
        stream, _ = opening.open_stream(serving.peer_id, "s")
        inner, _ = listener.accept()
        stream.sock.sendall(b"nobody reads this")
        assert select.select([inner.sock], [], [], 30)[0]

        def say_and_leave() -> None:
            inner.sock.sendall(bytes(LARGE))
            inner.close()

        threading.Thread(target=say_and_leave).start()
        assert len(stream.take_all()) == LARGE


def test_47_there_is_no_half_close(both: Pair, sockets: Path) -> None:
    opening, serving = both
    with Listener(serving, sockets) as listener:
        serving.add_handler(listener, "s")
        stream, _ = opening.open_stream(serving.peer_id, "s")
        inner, _ = listener.accept()
        stream.sock.shutdown(socket.SHUT_WR)
        assert inner.take_all() == b""
        inner.close()
        assert stream.take_all() == b""


def test_48_balanced_handlers_take_turns(pair: Pair, sockets: Path) -> None:
    tested, peer = pair
    peer.connect_to(tested)
    with Listener(tested, sockets) as first, Listener(tested, sockets) as second, Listener(tested, sockets) as third:
        tested.add_handler(first, "s", balanced=False)
        with pytest.raises(Refused):
            tested.add_handler(second, "s", balanced=False)
        tested.add_handler(second, "s", balanced=True)
        for listener in (first, second, first, second):
            stream, _ = peer.open_stream(tested.peer_id, "s")
            inner, _ = listener.accept()
            inner.close()
            assert stream.is_closed()
        with pytest.raises(Refused):
            tested.remove_handler(third, "s")
        with pytest.raises(Refused):
            tested.remove_handler(first, "unknown")
        tested.remove_handler(first, "s")
        for _ in range(2):
            stream, _ = peer.open_stream(tested.peer_id, "s")
            second.accept()
        tested.remove_handler(second, "s")
        deadline = time.monotonic() + 60
        while True:  # the last one has gone, and with it the protocol
            try:
                stream, _ = peer.open_stream(tested.peer_id, "s")
            except Refused:
                break
            stream.close()
            assert time.monotonic() < deadline


def test_49_a_handler_that_has_gone(both: Pair, sockets: Path) -> None:
    opening, serving = both
    listener = Listener(serving, sockets)
    serving.add_handler(listener, "s")
    listener.close()
    # The serving daemon resets the stream. That may overtake the answer that agrees to the protocol.
    try:
        stream, _ = opening.open_stream(serving.peer_id, "s")
    except Refused as e:
        assert "reset" in str(e)
    else:
        assert stream.is_closed()


def test_48_the_next_handler_stands_in_for_one_that_has_gone(our_pair: Pair, sockets: Path) -> None:
    opening, serving = our_pair
    gone = Listener(serving, sockets)
    serving.add_handler(gone, "s", balanced=True)
    gone.close()
    with Listener(serving, sockets) as listener:
        serving.add_handler(listener, "s", balanced=True)
        for _ in range(2):
            stream, _ = opening.open_stream(serving.peer_id, "s")
            inner, _ = listener.accept()
            inner.sock.sendall(b"here")
            assert stream.take(4) == b"here"


@pytest.fixture
def our_pair(our, start) -> Pair:
    opening, serving = start(our), start(our)
    opening.connect_to(serving)
    return opening, serving
