"""A ZeroMQ socket on a thread of its own, beside any event loop: pyzmq's own asyncio needs a loop that watches sockets, which the one of
Windows does not.

Knows sockets and threads. Does not know what is sent. A message goes as one frame of ZeroMQ's, in which its own frames stand each behind its length:
where a peer is killed between two real ones, libzmq 4.3.5 now and then ends the process of the other by a failed assertion.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from petals_win.errors import printable
from petals_win.jobs.links import CLOSE_S, HANDSHAKE_S
from petals_win.jobs.model import MOST_BYTES

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 8  # that the thread reads while the event loop is busy
_BATCH = 64
_MOST_FRAMES = 4
_FRAMING = 1024  # bytes, more than what stands around a message
Frames = list[bytes]
Deliver = Callable[[list[tuple[Frames, str]]], None]  # messages, each with the address that it came from


class Pump(threading.Thread):
    """A socket in a thread: what was sent goes out, what comes in is given to the event loop in batches.

    Once the thread runs, nobody else touches the socket. `others` are further sockets that it reads, each with its own function.
    `undelivered` gets the first frame of what could not be sent.
    """

    def __init__(
        self, context: zmq.Context, socket: zmq.Socket, deliver: Deliver, undelivered: Callable[[bytes], None]
    ):
        super().__init__(name="zmq", daemon=True)
        self.others: dict[zmq.Socket, Callable[[], None]] = {}
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self._context, self._socket, self._deliver = context, socket, deliver
        self._addressed = socket.type == zmq.ROUTER  # its messages have the peer's name before them
        self._undelivered = undelivered
        self._out: deque[Frames] = deque()
        self._ahead = threading.Semaphore(_BATCHES_AHEAD)
        self._stopping = False
        self._bell, self._rung = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._rung.bind(f"inproc://bell-{id(self)}")
        self._bell.connect(f"inproc://bell-{id(self)}")

    def send(self, frames: Frames) -> None:
        """Called on the event loop's thread, as `stop`."""
        self._out.append(frames)
        self._ring()

    async def stop(self) -> None:
        """Send what is left, and close all."""
        if not self._stopping:
            self._stopping = True
            self._ring()
        await asyncio.wait_for(asyncio.shield(self.ended), CLOSE_S)

    def _ring(self) -> None:
        if not self._bell.closed:
            with contextlib.suppress(zmq.Again):  # it has not heard the last ones yet
                self._bell.send(b"", zmq.DONTWAIT)

    def tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the event loop, from this thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(function, *arguments)

    def run(self) -> None:
        try:
            poller = zmq.Poller()
            for socket in (self._socket, self._rung, *self.others):
                poller.register(socket, zmq.POLLIN)
            while not self._stopping:
                for socket, _ in poller.poll():
                    if socket is self._rung:
                        self._drain_bell()
                    elif socket is self._socket:
                        self._read()
                    else:
                        self.others[socket]()
                self._write()
        except Exception:
            logger.exception("The thread of a ZeroMQ socket broke down")
        finally:
            for socket in self.others:
                socket.close(0)
            self._socket.close(200)
            self._rung.close(0)
            self.tell(self._bell.close, 0)
            self._context.term()  # when all are closed, and what was left is sent
            self.tell(self.ended.set_result, None)

    def _drain_bell(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._rung.recv(zmq.DONTWAIT)

    def _write(self) -> None:
        while self._out:
            frames = self._out.popleft()
            try:
                name, content = (frames[:1], frames[1:]) if self._addressed else ([], frames)
                self._socket.send_multipart([*name, packed(content)], zmq.DONTWAIT)
            except zmq.ZMQError:  # whoever it was for has gone
                self.tell(self._undelivered, frames[0])

    def _read(self) -> None:
        batch: list[tuple[Frames, str]] = []
        with contextlib.suppress(zmq.Again):
            while len(batch) < _BATCH:
                *name, message = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
                frames = [*(each.bytes for each in name), *unpacked(message.bytes)]
                address = message.get("Peer-Address") if self._addressed and len(frames) > 3 else ""
                batch.append((frames, str(address)))
        while batch and not self._stopping:
            if self._ahead.acquire(timeout=0.2):
                self.tell(self._delivered, batch)
                return

    def _delivered(self, batch: list[tuple[Frames, str]]) -> None:
        try:
            self._deliver(batch)
        finally:
            self._ahead.release()


def packed(frames: Frames) -> bytes:
    """Frames as one, each behind its length in four bytes."""
    return b"".join(part for frame in frames for part in (len(frame).to_bytes(4, "big"), frame))


def unpacked(data: bytes) -> Frames:
    """The frames of `packed`; none if that is not how the bytes were made."""
    frames, at = [], 0
    while at < len(data) and len(frames) <= _MOST_FRAMES:
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "big")
        frames.append(data[begin:at])
    return frames if at == len(data) else []


def new_socket(context: zmq.Context, kind: int) -> zmq.Socket:
    """A socket that takes no more of a stranger than it must."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES + _FRAMING)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.LINGER, 0)
    return socket


def tcp(host: str, port: int | str) -> str:
    """An address as ZeroMQ has it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def plain(address: str) -> str:
    """For people: an IPv4 address comes in the form of IPv6."""
    return printable(address).removeprefix("::ffff:")[:64]
