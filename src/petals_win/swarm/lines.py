"""Lines: one long stream from a peer to another one of ours, on which short messages of many sessions travel together.

All that is sent in one turn of the event loop is one frame: one write, one read and one wake-up instead of one for each session.
Knows streams, and what a frame looks like. Does not know what the messages say: each is for a session, and what cannot go on a line
goes as it would without one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

from hivemind import PeerID
from hivemind.p2p import P2PDaemonError

logger = logging.getLogger(__name__)

Stream = tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]

NAME = "petals-win.line"  # by which a peer is asked for one
MOST_BYTES = 2**18  # of a message; prompts do not hold up others' tokens
OPEN_SECONDS = 5.0  # until both sides have said the line's name
_FRAME_BYTES = 2**20
_WAITING_BYTES = 8 * 2**20  # that the peer may be behind
_MOST_PEERS = 64
_IDLE_SECONDS = 60.0  # after which a line that nobody uses is closed, and one that could not be opened is tried again

# A frame is its length, and messages: how long the session's name is, how long the message is, both of them.
_LENGTH, _LENGTHS = struct.Struct("!I"), struct.Struct("!BI")


class BadFrame(ValueError):
    """A peer sent what is no frame."""


class Line:
    """One end of a line, on the event loop that made it; `number` tells it from earlier ones to the same peer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int = 0):
        self._reader, self._writer, self.number = reader, writer, number
        self._waiting: list[bytes] = []  # for the end of this turn of the loop
        self._size = 0  # of these in bytes
        self.used = False

    def send(self, session: str, message: bytes) -> bool:
        """Send a message with all others of this turn; False if it is too long, the peer too far behind, or the line closed."""
        name = session.encode()
        if len(name) > 255 or len(message) > MOST_BYTES or self._writer.is_closing():
            return False
        if self._size + self._writer.transport.get_write_buffer_size() > _WAITING_BYTES:
            return False
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._write)
        self._waiting.append(_LENGTHS.pack(len(name), len(message)) + name + message)
        self._size += len(self._waiting[-1])
        self.used = True
        return True

    def _write(self) -> None:
        waiting, self._waiting, self._size = self._waiting, [], 0
        if not self._writer.is_closing():
            for frame in _frames(waiting):
                self._writer.write(frame)

    async def drain(self) -> None:
        """Wait until the peer is not behind. Raises ConnectionError."""
        await self._writer.drain()

    async def read(self) -> Iterator[tuple[str, bytes]]:
        """The messages of the next frame, each with its session. Raises EOFError at the end, ConnectionError, and BadFrame, which
        reading them may, too."""
        (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        if length > _FRAME_BYTES:
            raise BadFrame(f"A frame may have {_FRAME_BYTES:,} bytes, not {length:,}")
        return _messages(await self._reader.readexactly(length))

    def close(self) -> None:
        """What is not sent yet is lost, and the peer learns of it. Closing twice is allowed."""
        self._writer.close()


def _frames(messages: Iterable[bytes]) -> Iterator[bytes]:
    frame, size = [], 0
    for message in messages:
        if size + len(message) > _FRAME_BYTES:
            yield b"".join([_LENGTH.pack(size), *frame])
            frame, size = [], 0
        frame.append(message)
        size += len(message)
    if frame:
        yield b"".join([_LENGTH.pack(size), *frame])


def _messages(frame: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    try:
        while at < len(frame):
            named, length = _LENGTHS.unpack_from(frame, at)
            begin = at + _LENGTHS.size + named
            name, message = frame[begin - named : begin], frame[begin : begin + length]
            if len(name) < named or len(message) < length or length > MOST_BYTES:
                raise BadFrame("A message is cut off, or longer than it may be")
            yield name.decode(), message
            at = begin + length
    except (struct.error, UnicodeDecodeError) as e:
        raise BadFrame("A frame cannot be read") from e


class Receiver(Protocol):
    """Of what comes for a session."""

    def received(self, message: bytes) -> None: ...

    def lost(self, line: Line) -> None:
        """The line has ended; nothing more comes on it."""


class Way:
    """The line to one peer, while there is one; it is opened when a session joins, or wants it."""

    def __init__(self, peer_id: PeerID, open_stream: Callable[[], Awaitable[Stream]], name: str):
        self.name, self._peer_id, self._open_stream = name, peer_id, open_stream
        self._line: Line | None = None
        self._receivers: dict[str, Receiver] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # those that have given up their line read what still comes
        self._opening = self._failed = False
        self.tried = 0  # lines, the last of which may not be open yet

    @property
    def line(self) -> Line | None:
        """The line, if it is open; otherwise it is being opened."""
        self._open()
        return self._line

    def _open(self) -> None:
        if self._line is None and not self._opening and not self._failed:
            self._opening = True
            task = asyncio.create_task(self._keep())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def rested(self) -> bool:
        """Whether nobody has used it since the last call. A line that could not be opened may be tried again from now on."""
        used = self._opening or (self._line is not None and self._line.used)
        if self._line is not None:
            self._line.used = False
        self._failed = False
        return not used and not self._receivers

    def join(self, session: str, receiver: Receiver) -> None:
        """What comes for the session is for `receiver`, until it leaves."""
        self._receivers[session] = receiver
        self._open()

    def leave(self, session: str) -> None:
        self._receivers.pop(session, None)

    def give_up(self) -> None:
        """The peer says nothing: the next messages go on a new line, if it can be opened."""
        line, self._line = self._line, None
        if line is not None:
            asyncio.get_running_loop().call_later(_IDLE_SECONDS, line.close)

    def close(self) -> None:
        """End the line."""
        for task in self._tasks:
            task.cancel()

    async def _keep(self) -> None:
        line = None
        self.tried += 1
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                _, reader, writer = await self._open_stream()
                line = Line(reader, writer, self.tried)
                line.send(self.name, b"")
                messages = await line.read()  # its name again, and perhaps more
            self._line, self._opening = line, False
            while True:
                for session, message in messages:
                    if (receiver := self._receivers.get(session)) is not None:
                        receiver.received(message)
                messages = await line.read()
        except (OSError, EOFError, BadFrame, P2PDaemonError) as e:  # whoever waits for messages hears of it
            logger.debug("No line to …%s: %r", str(self._peer_id)[-6:], e)
            self._failed = self._opening
        finally:
            self._opening = False
            if line is not None:
                self._line = None if self._line is line else self._line
                line.close()
                for receiver in list(self._receivers.values()):
                    receiver.lost(line)


class Lines:
    """Ways from here to other peers, all on one event loop.

    :param open_stream: opens a stream to a peer, by NAME
    """

    def __init__(self, open_stream: Callable[[PeerID], Awaitable[Stream]]):
        self.name = secrets.token_hex(8)  # under which the peers know this end
        self._open_stream = open_stream
        self._ways: dict[PeerID, Way] = {}

    def to(self, peer_id: PeerID) -> Way | None:
        """The way to a peer; None if there are too many already."""
        way = self._ways.get(peer_id)
        if way is None and len(self._ways) < _MOST_PEERS:
            way = self._ways[peer_id] = Way(peer_id, lambda: self._open_stream(peer_id), self.name)
            asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._look_at, peer_id, way)
        return way

    def _look_at(self, peer_id: PeerID, way: Way) -> None:
        if way.rested():
            del self._ways[peer_id]
            way.close()
        else:
            asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._look_at, peer_id, way)

    def close(self) -> None:
        """End all lines."""
        for way in self._ways.values():
            way.close()
