"""Statements 37 to 42 of the conformance checklist: what a unary call is between two peers.

One side of each call is a raw stream that this test writes and reads itself, through the other daemon.
"""

from __future__ import annotations

import os
from pathlib import Path

import p2pd_wire as wire
import pytest
from conftest import Start
from p2pd_client import Connection, Daemon, Listener, Persistent, Program

NAME = "Test.call"  # without a leading slash
Pair = tuple[Daemon, Daemon]


def request_frame(call_id: bytes, data: bytes, peer: bytes = b"anybody") -> bytes:
    return wire.message((1, call_id), (wire.CALL_UNARY, wire.message((1, peer), (2, NAME), (3, data))))


@pytest.fixture
def callee(pair: Pair) -> tuple[Persistent, Connection]:
    """A handler of the daemon under test, and a raw stream to it."""
    tested, peer = pair
    handler = tested.persistent()
    assert handler.add(NAME).done
    peer.connect_to(tested)
    stream, info = peer.open_stream(tested.peer_id, NAME)
    assert info[3] == [NAME.encode()]
    return handler, stream


def test_37_38_request_and_answer(callee: tuple[Persistent, Connection], pair: Pair) -> None:
    handler, stream = callee
    call_id = os.urandom(16)
    stream.send(request_frame(call_id, b"ping"))
    call = handler.next_call()
    assert (call.id, call.data, call.protocol, call.peer) == (call_id, b"ping", NAME, pair[1].peer_id)
    handler.answer(call, b"pong")
    answer = wire.parse(stream.receive())
    assert answer == {1: [call_id], wire.UNARY_RESPONSE: [wire.message((1, b"pong"))]}
    assert stream.is_closed()


def test_37_38_39_what_the_caller_sends(pair: Pair, sockets: Path) -> None:
    tested, peer = pair
    with Listener(peer, sockets) as listener:
        peer.add_handler(listener, NAME)
        caller = tested.persistent()
        call_id = caller.start_call(peer.peer_id, NAME, b"ping")
        stream, info = listener.accept()
        assert info[1] == [tested.peer_id] and info[3] == [NAME.encode()]
        request = wire.parse(stream.receive())
        assert set(request) == {1, wire.CALL_UNARY} and request[1] == [call_id]
        assert wire.parse(request[wire.CALL_UNARY][0])[3] == [b"ping"]
        stream.sock.settimeout(2)  # the caller's side stays open, and silent, until it has the answer
        with pytest.raises(TimeoutError):
            stream.take(1)
        stream.send(wire.message((1, call_id), (wire.UNARY_RESPONSE, wire.message((1, b"pong")))))
        assert caller.wait(call_id).answer == {1: [b"pong"]}
        stream.sock.settimeout(20)
        assert stream.is_closed()


@pytest.mark.parametrize("how", ["end", "reset", "one more byte"])
def test_40_loss_of_interest(callee: tuple[Persistent, Connection], how: str) -> None:
    handler, stream = callee
    call_id = os.urandom(16)
    stream.send(request_frame(call_id, b"ping"))
    call = handler.next_call()
    if how == "end":
        stream.close()
    elif how == "reset":
        stream.reset()
    else:
        stream.sock.sendall(b"x")
    assert handler.next_cancel() == call_id
    handler.answer(call, b"late")
    assert handler.add("another").done


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(wire.varint((4 << 20) + 1), id="too long"),
        pytest.param(wire.varint(1 << 40), id="2^40"),
        pytest.param(wire.frame(b"\xff\xff\xff"), id="garbage"),
        pytest.param(wire.frame(wire.message((1, bytes(16)))), id="no call"),
        pytest.param(wire.frame(wire.message((1, bytes(16)), (wire.CANCEL, b""))), id="cancel"),
        pytest.param(wire.frame(request_frame(bytes(15), b"x")), id="short id"),
        pytest.param(wire.frame(wire.message((1, bytes(16)), (wire.CALL_UNARY, wire.message((1, b"x"))))), id="half"),
    ],
)
def test_41_bad_frames(callee: tuple[Persistent, Connection], sent: bytes) -> None:
    handler, stream = callee
    stream.sock.sendall(sent)
    assert stream.is_closed()
    assert handler.add("another").done and handler.calls.empty()


@pytest.mark.parametrize("answer", [b"", wire.frame(b"\xff\xff\xff"), wire.frame(wire.message((1, bytes(16))))])
def test_41_bad_answers(our: Program, other_raw: Daemon, start: Start, sockets: Path, answer: bytes) -> None:
    tested = start(our)
    tested.connect_to(other_raw)
    with Listener(other_raw, sockets) as listener:
        other_raw.add_handler(listener, NAME)
        caller = tested.persistent()
        call_id = caller.start_call(other_raw.peer_id, NAME, b"ping")
        stream, _ = listener.accept()
        stream.receive()
        stream.sock.sendall(answer)
        stream.close()
        assert caller.wait(call_id).error


@pytest.fixture
def other_raw(reference: Program, start: Start) -> Daemon:
    return start(reference)


def test_42_over_the_limit(program: Program, other: Program, start: Start) -> None:
    small, large = start(program, "-persistentConnMaxMsgSize=10000"), start(other)
    small.connect_to(large)
    large.connect_to(small)
    at_small, at_large = small.persistent(), large.persistent()
    assert at_small.add(NAME).done and at_large.add("Test.big").done
    at_small.serve(lambda call: call.data)
    at_large.serve(lambda call: bytes(20000))
    assert at_large.call(small.peer_id, NAME, bytes(9000)).answer == {1: [bytes(9000)]}
    assert at_large.call(small.peer_id, NAME, bytes(20000)).error  # the callee reads no more than its limit
    assert at_small.call(large.peer_id, "Test.big").error  # nor does the caller
    assert at_large.call(small.peer_id, NAME, b"next").answer == {1: [b"next"]}
    assert at_small.add("another").done
