"""Responses that go out piece by piece: which pieces share a message, and how long one waits for others."""

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from petals_win.api import streaming
from petals_win.api.server import _Gathering
from petals_win.api.streaming import Stream, json_event, json_line

SOON_S = 0.3


def sent(pieces: AsyncGenerator[bytes, None], **settings) -> list[tuple[float, bytes]]:
    """The bodies of the messages of a stream, and when they were sent; nothing is empty but the end."""
    messages: list[tuple[float, bytes]] = []
    kinds: list[str] = []

    async def send(message) -> None:
        kinds.append(message["type"])
        if message["type"] == "http.response.body":
            messages.append((time.monotonic() - began, message["body"]))
            assert message["body"] or not message["more_body"]

    async def run() -> None:
        nobody_leaves = asyncio.Event()
        await asyncio.wait_for(Stream(pieces, **settings)({}, nobody_leaves.wait, send), 30)

    began = time.monotonic()
    asyncio.run(run())
    assert kinds == ["http.response.start", *["http.response.body"] * len(messages)]
    return messages


def test_pieces_that_come_faster_than_a_screen_shows_them_share_a_message(monkeypatch):
    monkeypatch.setattr(streaming, "SOON_S", SOON_S)

    async def pieces():
        for number in range(40):
            yield b"%d," % number
            await asyncio.sleep(SOON_S / 20)

    messages = sent(pieces())
    assert messages[0][1] == b"0,", "the first is what people wait for"
    assert b"".join(body for _, body in messages) == b"".join(b"%d," % number for number in range(40))
    assert len(messages) < 12


def test_a_piece_waits_for_others_no_longer_than_that(monkeypatch):
    monkeypatch.setattr(streaming, "SOON_S", SOON_S)

    async def pieces():
        yield b"a"
        await asyncio.sleep(SOON_S / 10)
        yield b"b"
        await asyncio.sleep(10 * SOON_S)
        yield b"c"

    (_, a), (second, b), *rest = sent(pieces())
    assert (a, b) == (b"a", b"b") and second < 5 * SOON_S
    assert b"".join(body for _, body in rest) == b"c"


def test_slow_pieces_do_not_wait(monkeypatch):
    monkeypatch.setattr(streaming, "SOON_S", SOON_S / 10)
    told: list[float] = []

    async def pieces():
        began = time.monotonic()
        for _ in range(4):
            told.append(time.monotonic() - began)
            yield b"x"
            await asyncio.sleep(SOON_S)

    messages = sent(pieces())
    assert [body for _, body in messages] == [b"x"] * 4 + [b""]
    assert max(at - piece for (at, _), piece in zip(messages, told, strict=False)) < SOON_S / 2


def test_what_is_there_goes_together_with_the_end():
    left = [b"a", b"b", b"c"]

    async def pieces():
        while left:
            yield left.pop(0)

    assert [body for _, body in sent(pieces(), more=lambda: True)] == [b"abc"]


def test_pings_come_between_pieces_and_take_along_what_waits(monkeypatch):
    monkeypatch.setattr(streaming, "SOON_S", 10.0)
    monkeypatch.setattr(streaming, "PING_S", SOON_S)

    async def pieces():
        yield b"a"
        yield b"b"
        await asyncio.sleep(1.5 * SOON_S)

    assert [body for _, body in sent(pieces(), ping=lambda: b"!")] == [b"a", b"b!", b""]


def test_a_broken_stream_raises_and_ends_its_pieces():
    ended = []

    async def pieces():
        try:
            yield b"a"
            raise ZeroDivisionError
        finally:
            ended.append(True)

    with pytest.raises(ZeroDivisionError):
        sent(pieces())
    assert ended == [True]


def test_events_and_lines_are_one_line_for_everybody():
    body = {"text": "a\u2028b\u0085c\nd é"}
    assert json_event(body).decode() == 'data: {"text":"a\\u2028b\\u0085c\\nd é"}\n\n'
    assert json_event(body, "named").startswith(b"event: named\ndata: {")
    assert json_line(body) == b'{"text":"a\\u2028b\\u0085c\\nd \\u00e9"}\n'


class Written:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def test_what_is_written_in_one_turn_of_the_loop_is_one_call():
    async def run() -> None:
        transport = Written()
        gathering = _Gathering(transport)
        gathering.write(b"head")
        gathering.write(b"beginning")
        assert not transport.writes
        await asyncio.sleep(0)
        assert transport.writes == [b"headbeginning"]
        gathering.write(b"end")
        gathering.close()
        assert transport.writes[1:] == [b"end"] and gathering.is_closing()
        await asyncio.sleep(0)

    asyncio.run(run())
