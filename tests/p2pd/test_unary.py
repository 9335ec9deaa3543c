"""Statements 23 to 36 of the conformance checklist: unary handlers and calls on persistent connections."""

from __future__ import annotations

import os
import queue
import time
from collections import Counter

import p2pd_wire as wire
import pytest
from conftest import LONG_SECONDS, LongCalls, Start
from p2pd_client import NAME, Closed, Daemon, Program, Refused, serve

Pair = tuple[Daemon, Daemon]


@pytest.fixture(params=["calls", "is called"])
def both(pair: Pair, request: pytest.FixtureRequest) -> Pair:
    """The caller's daemon and the callee's: the one under test in either role."""
    tested, peer = pair
    return (tested, peer) if request.param == "calls" else (peer, tested)


def test_23_registration_is_confirmed(daemon: Daemon) -> None:
    persistent = daemon.persistent()
    call_id = persistent.start(wire.ADD_UNARY, wire.message((1, NAME), (2, False)))
    assert persistent.wait(call_id).fields == {1: [call_id]}


def test_24_duplicates(daemon: Daemon) -> None:
    first, second = daemon.persistent(), daemon.persistent()
    assert first.add(NAME, balanced=False).done
    assert second.add(NAME, balanced=False).error
    assert first.add(NAME, balanced=False).error
    assert second.add(NAME, balanced=True).done
    assert second.add(NAME, balanced=True).done  # a second slot


def test_25_removal(daemon: Daemon) -> None:
    first, second = daemon.persistent(), daemon.persistent()
    assert first.remove(NAME).error
    assert first.add(NAME).done
    foreign, unknown = second.remove(NAME).error, second.remove("another").error
    assert foreign and unknown and foreign != unknown
    assert first.remove(NAME).done
    assert second.add(NAME).done


def test_26_balanced_handlers_take_turns(pair: Pair) -> None:
    tested, peer = pair
    handlers = [tested.persistent() for _ in range(3)]
    for n, handler in enumerate(handlers):
        assert handler.add(NAME, balanced=True).done
        handler.serve(lambda call, n=n: str(n).encode())
    caller = peer.persistent()

    def turn(count: int) -> list[bytes]:
        return [caller.call(tested.peer_id, NAME).answer[1][0] for _ in range(count)]

    assert turn(7) == [b"0", b"1", b"2", b"0", b"1", b"2", b"0"]
    handlers[1].close()
    deadline = time.monotonic() + 60
    answered: set[bytes] = set()
    while answered != {b"0", b"2"}:
        assert time.monotonic() < deadline
        replies = [caller.call(tested.peer_id, NAME) for _ in range(3)]  # an error, if its handler went meanwhile
        answered = {reply.answer[1][0] for reply in replies if wire.CALL_RESPONSE in reply.fields}
    after = turn(6)
    assert after in ([b"0", b"2"] * 3, [b"2", b"0"] * 3)


def test_27_what_is_for_nobody_is_ignored(daemon: Daemon) -> None:
    persistent = daemon.persistent()
    for length in (0, 15, 17):
        persistent.send(bytes(length), (wire.REMOVE_UNARY, wire.message((1, NAME))))
    persistent.cancel(os.urandom(16))
    persistent.send(os.urandom(16), (wire.UNARY_RESPONSE, wire.message((1, b"late"))))
    persistent.send(os.urandom(16))
    assert persistent.add(NAME).done
    assert all(persistent.replies(bytes(length)) == 0 for length in (0, 15, 17))


def test_28_many_calls_at_once(both: Pair) -> None:
    calling, called = both
    serve(called).serve(lambda call: call.data)
    caller = calling.persistent()
    sent = {caller.start_call(called.peer_id, NAME, str(n).encode()): str(n).encode() for n in range(200)}
    assert all(caller.wait(call_id).answer == {1: [data]} for call_id, data in sent.items())
    time.sleep(0.2)
    assert Counter(caller.replies(call_id) for call_id in sent) == {1: 200}


def test_29_the_handler_sees_who_calls(both: Pair) -> None:
    calling, called = both
    handler = serve(called)
    call_id = calling.persistent().start_call(called.peer_id, NAME, b"x")
    call = handler.next_call()
    assert (call.peer, call.protocol, call.data, call.id) == (calling.peer_id, NAME, b"x", call_id)


def test_30_errors_and_empty_answers(both: Pair) -> None:
    calling, called = both
    handler, caller = serve(called), calling.persistent()
    failing = caller.start_call(called.peer_id, NAME)
    handler.answer_error(handler.next_call(), b"ValueError('\xff')")
    assert caller.wait(failing).answer == {2: [b"ValueError('\xff')"]}
    empty = caller.start_call(called.peer_id, NAME)
    handler.answer(handler.next_call(), b"")
    assert caller.wait(empty).answer == {1: [b""]}


def test_31_calls_that_cannot_be_made(program: Program, pair: Pair) -> None:
    tested, peer = pair
    caller = tested.persistent()
    stranger = bytes.fromhex("0024080112 20") + os.urandom(32)
    assert caller.call(peer.peer_id, "nobody").error
    assert caller.call(stranger, NAME).error
    assert caller.call(tested.peer_id, NAME).error
    assert caller.call(b"not a peer", NAME).error
    assert serve(tested, "another")  # and the daemon lives on


def test_31_refused_dial(program: Program, start: Start) -> None:
    tested, gone = start(program), start(program)
    addresses = [wire.address(a) for a in gone.identify()[1]]
    gone.kill()
    with pytest.raises(Refused):  # but now the daemon knows an address
        tested.ask(wire.CONNECT, wire.message((1, gone.peer_id), *((2, a) for a in addresses)))
    began = time.monotonic()
    assert tested.persistent().call(gone.peer_id, NAME, timeout_s=60).error
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("dies", marks=pytest.mark.wine_lacks("the sure end of a killed process's connections")),
        "disconnected",
    ],
)
def test_32_the_remote_side_goes(program: Program, other: Program, start: Start, how: str) -> None:
    tested, peer = start(program), start(other)
    tested.connect_to(peer)
    handler, caller = serve(peer), tested.persistent()
    call_id = caller.start_call(peer.peer_id, NAME)
    handler.next_call()
    if how == "dies":
        peer.kill()
    else:
        tested.ask(wire.DISCONNECT, wire.message((1, peer.peer_id)))
    assert caller.wait(call_id, 30).error


def test_33_cancel(both: Pair) -> None:
    calling, called = both
    handler, caller = serve(called), calling.persistent()
    call_id = caller.start_call(called.peer_id, NAME)
    call = handler.next_call()
    caller.cancel(call_id)
    assert caller.wait(call_id).cancelled
    assert handler.next_cancel() == call.id
    handler.answer(call, b"late")
    handler.serve(lambda call: call.data)
    assert caller.call(called.peer_id, NAME, b"next").answer == {1: [b"next"]}
    assert caller.replies(call_id) == 1


def test_35_handlers_go_with_their_client(both: Pair) -> None:
    calling, called = both
    handler, caller = serve(called), calling.persistent()
    keeper = called.persistent()  # or the daemon would go as well
    handler.close()
    deadline = time.monotonic() + 60
    while "protocols not supported" not in (caller.call(called.peer_id, NAME).error or ""):
        assert time.monotonic() < deadline
    assert keeper.add(NAME).done


def test_36_the_handlers_client_goes_during_a_call(our: Program, reference: Program, start: Start) -> None:
    tested = start(our)
    keeper = tested.persistent()
    for peer in (start(our), start(reference)):
        peer.connect_to(tested)
        handler, caller = serve(tested), peer.persistent()
        call_id = caller.start_call(tested.peer_id, NAME)
        handler.next_call()
        handler.close()
        assert caller.wait(call_id, 30).error
    assert not keeper.ended.is_set()


def test_36_the_callers_client_goes_during_a_call(our: Program, start: Start) -> None:
    tested, peer = start(our), start(our)
    tested.connect_to(peer)
    keeper, handler = tested.persistent(), serve(peer)
    caller = tested.persistent()
    call_id = caller.start_call(peer.peer_id, NAME)
    handler.next_call()
    caller.close()
    assert handler.next_cancel(30) == call_id
    with pytest.raises(queue.Empty):
        handler.next_call(0.1)
    assert not keeper.ended.is_set()


def test_a_malformed_message_ends_the_connection_alone(daemon: Daemon) -> None:
    keeper, persistent = daemon.persistent(), daemon.persistent()
    persistent.connection.send(b"\xff\xff\xff")
    assert persistent.ended.wait(20)
    with pytest.raises((Closed, OSError)):
        persistent.add(NAME)
    assert keeper.add(NAME).done


@pytest.mark.slow
def test_34_39_a_call_has_no_time_limit(long_calls: LongCalls) -> None:
    begun, calls = long_calls
    time.sleep(max(begun + LONG_SECONDS - time.monotonic(), 0))
    for handler, call, caller, call_id in calls:
        assert handler.cancels.empty()
        handler.answer(call, b"at last")
        assert caller.wait(call_id).answer == {1: [b"at last"]}
