"""Lines over pairs of sockets: frames, what they may have, and a peer's line that comes and goes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hivemind import PeerID
from hivemind.p2p import P2PDaemonError

from petals_win.swarm import lines
from petals_win.swarm.lines import BadFrame, Line, Lines

PEER = PeerID.from_base58("QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY")


async def streams() -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return [await asyncio.open_connection(sock=end) for end in socket.socketpair()]


def run(action: Callable[[], Awaitable[Any]]) -> Any:
    async def within():
        async with asyncio.timeout(60):
            return await action()

    return asyncio.run(within())


async def eventually(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


class Kept:
    """What a session gets."""

    def __init__(self):
        self.messages: list[bytes] = []
        self.ended: list[Line] = []

    def received(self, message: bytes) -> None:
        self.messages.append(message)

    def lost(self, line: Line) -> None:
        self.ended.append(line)


class Peer:
    """At the other end of a Lines' streams: sends each message back, to its session."""

    def __init__(self):
        self.lines: list[Line] = []
        self.asked = 0
        self.fails: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, peer_id: PeerID) -> Any:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        theirs, own = await streams()
        self._tasks.append(asyncio.create_task(self._serve(Line(*own))))
        return None, *theirs

    async def _serve(self, line: Line) -> None:
        self.lines.append(line)
        try:
            while True:
                for session, message in await line.read():
                    line.send(session, message)
        except EOFError:
            line.close()


def test_what_is_sent_in_one_turn_of_the_loop_is_one_frame():
    async def send():
        (_, writer), (reader, _) = await streams()
        line, other = Line(asyncio.StreamReader(), writer), Line(reader, writer)
        for number in range(16):
            assert line.send(f"session {number}", bytes([number]) * number)
        together = list(await other.read())
        line.send("ü", b"later")
        return together, list(await other.read())

    together, later = run(send)
    assert together == [(f"session {number}", bytes([number]) * number) for number in range(16)]
    assert later == [("ü", b"later")]


def test_frames_are_no_longer_than_they_may_be():
    async def send():
        (_, writer), (reader, other_writer) = await streams()
        line, other = Line(asyncio.StreamReader(), writer), Line(reader, other_writer)
        assert not line.send("s", bytes(lines.MOST_BYTES + 1)) and not line.send("s" * 256, b"")
        for _ in range(5):
            assert line.send("s", bytes(lines.MOST_BYTES))
        return [len(list(await other.read())) for _ in range(2)]

    assert run(send) == [3, 2]


def test_a_peer_that_is_behind_gets_no_more(monkeypatch):
    monkeypatch.setattr(lines, "_WAITING_BYTES", 2**20)

    async def send():
        (_, writer), (reader, other_writer) = await streams()
        line, other, taken = Line(asyncio.StreamReader(), writer), Line(reader, other_writer), 0
        while line.send("s", bytes(lines.MOST_BYTES)):
            taken += 1
            await asyncio.sleep(0)
        assert 4 <= taken < 100
        draining = asyncio.create_task(line.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        for _ in range(taken):
            taken -= len(list(await other.read()))
            if not taken:
                break
        await draining
        return line.send("s", bytes(lines.MOST_BYTES))

    assert run(send)


def test_a_line_that_is_closed_takes_nothing():
    async def send():
        (_, writer), (reader, other_writer) = await streams()
        line = Line(asyncio.StreamReader(), writer)
        line.close()
        line.close()
        assert not line.send("s", b"")
        with pytest.raises(EOFError):
            await Line(reader, other_writer).read()

    run(send)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!I", 2**20 + 1),  # its length alone: nothing is waited for, and no memory taken
        struct.pack("!I", 2**32 - 1),
        struct.pack("!I3s", 3, b"abc"),
        struct.pack("!IBI1s", 6, 2, 0, b"s"),
        struct.pack("!IBI2s", 7, 1, 2, b"sx"),
        struct.pack("!IBI1s", 6, 1, 0, b"\xff"),
        struct.pack("!IBI1s", 6 + 2**18 + 1, 1, 2**18 + 1, b"s") + bytes(2**18 + 1),
    ],
)
def test_what_is_no_frame(frame):
    async def read():
        (_, writer), (reader, other_writer) = await streams()
        writer.write(frame)
        with pytest.raises(BadFrame):
            list(await Line(reader, other_writer).read())

    run(read)


def test_sessions_share_the_line_to_a_peer():
    async def share():
        peer, one, other = Peer(), Kept(), Kept()
        ways = Lines(peer.open)
        way = ways.to(PEER)
        assert way is not None and way is ways.to(PEER)
        way.join("one", one)
        way.join("other", other)
        assert way.line is None  # it is on its way
        await eventually(lambda: way.line)
        way.line.send("one", b"1")
        way.line.send("other", b"2")
        way.line.send("nobody", b"3")
        await eventually(lambda: other.messages)
        way.leave("one")
        way.line.send("one", b"4")
        way.line.send("other", b"5")
        await eventually(lambda: len(other.messages) == 2)
        assert (one.messages, other.messages, peer.asked) == ([b"1"], [b"2", b"5"], 1)
        line = way.line
        peer.lines[0].close()
        await eventually(lambda: other.ended)
        assert other.ended == [line] and not one.ended
        await eventually(lambda: way.line)  # a new one
        assert peer.asked == 2 and way.line is not line
        ways.close()

    run(share)


def test_a_line_that_was_given_up_is_still_read():
    async def give_up():
        peer, kept = Peer(), Kept()
        way = Lines(peer.open).to(PEER)
        assert way is not None
        way.join("s", kept)
        await eventually(lambda: way.line)
        first = way.line
        way.give_up()
        await eventually(lambda: way.line)
        assert way.line is not first and len(peer.lines) == 2
        peer.lines[0].send("s", b"late")
        peer.lines[1].send("s", b"new")
        await eventually(lambda: len(kept.messages) == 2)
        peer.lines[0].close()
        await eventually(lambda: kept.ended)
        assert kept.ended == [first] and way.line is not None
        way.close()

    run(give_up)


@pytest.mark.parametrize("why", [P2PDaemonError("protocols not supported"), ConnectionError(), TimeoutError()])
def test_a_peer_without_lines_is_asked_again_only_after_a_while(why, monkeypatch):
    monkeypatch.setattr(lines, "_IDLE_SECONDS", 2.0)

    async def ask():
        peer = Peer()
        peer.fails = why
        way = Lines(peer.open).to(PEER)
        assert way is not None
        way.join("s", Kept())
        for _ in range(5):
            assert way.line is None
            await asyncio.sleep(0.01)
        assert peer.asked == 1
        peer.fails = None
        await eventually(lambda: way.line)
        way.close()

    run(ask)


def test_a_peer_that_does_not_answer_to_a_line_s_name(monkeypatch):
    monkeypatch.setattr(lines, "OPEN_SECONDS", 0.05)

    async def ask():
        (reader, writer), (other, _) = await streams()

        async def silent(_peer_id: PeerID) -> Any:
            return None, reader, writer

        way = Lines(silent).to(PEER)
        assert way is not None and way.line is None
        await asyncio.wait_for(other.read(), 30)  # until it is closed
        assert way.line is None

    run(ask)


def test_lines_that_nobody_uses_are_closed(monkeypatch):
    monkeypatch.setattr(lines, "_IDLE_SECONDS", 0.05)

    async def use():
        peer = Peer()
        ways = Lines(peer.open)
        way = ways.to(PEER)
        assert way is not None
        way.join("s", Kept())
        await eventually(lambda: way.line)
        await asyncio.sleep(0.2)
        assert ways.to(PEER) is way and way.line is not None  # a session is there, though it says nothing
        way.leave("s")
        await eventually(lambda: ways.to(PEER) is not way)
        await eventually(lambda: not way._tasks)

    run(use)


def test_no_more_peers_than_a_pc_has_lines_for(monkeypatch):
    monkeypatch.setattr(lines, "_MOST_PEERS", 1)

    async def ask():
        ways = Lines(Peer().open)
        assert ways.to(PEER) is not None and ways.to(PeerID(b"another")) is None

    run(ask)
