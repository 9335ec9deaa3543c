"""A ZeroMQ socket on an event loop. pyzmq's own asyncio needs a loop that watches sockets, which the one of Windows does not; there a
thread watches, and touches nothing else.

Knows sockets and loops. Does not know what is sent. A message goes as one frame of ZeroMQ's, in which its own frames stand each behind its length:
where a peer is killed between two real ones, libzmq 4.3.5 now and then ends the process of the other by a failed assertion.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket as sockets
import threading
from collections.abc import Callable

import zmq

from petals_win.errors import printable
from petals_win.jobs.links import CLOSE_S, HANDSHAKE_S
from petals_win.jobs.model import MOST_BYTES

_BATCH = 64
_MOST_FRAMES = 4
_FRAMING = 1024  # bytes, more than what stands around a message
Frames = list[bytes]
Deliver = Callable[[list[tuple[Frames, str]]], None]  # messages, each with the address that it came from


class Pump:
    """A socket of the loop that runs now: messages go out at once, and what comes in is delivered in batches.

    `others` are further sockets with what reads a message of theirs. `undelivered` gets the first frame of what could not be sent.
    """

    def __init__(
        self,
        context: zmq.Context,
        socket: zmq.Socket,
        deliver: Deliver,
        undelivered: Callable[[bytes], None],
        others: dict[zmq.Socket, Callable[[], None]],
    ):
        self.loop = asyncio.get_running_loop()
        self._context, self._socket, self._deliver = context, socket, deliver
        self._addressed = socket.type == zmq.ROUTER  # its messages have the peer's name before them
        self._undelivered = undelivered
        self._others = others
        self._looking: asyncio.Handle | None = None
        self._ended: asyncio.Future[None] | None = None
        self._watch = watch(self.loop, [int(each.getsockopt(zmq.FD)) for each in (socket, *others)], self._look)
        self._look_soon()

    def send(self, frames: Frames) -> None:
        """Without waiting; nothing once it has stopped."""
        if self._ended is not None:
            return
        name, content = (frames[:1], frames[1:]) if self._addressed else ([], frames)
        try:
            self._socket.send_multipart([*name, packed(content)], zmq.DONTWAIT)
        except zmq.ZMQError:  # whoever it was for has gone
            self.loop.call_soon(self._undelivered, frames[0])
        self._look_soon()  # sending may have taken notice of what came, of which the descriptor then says nothing

    async def stop(self) -> None:
        """Send what is left, and close all."""
        if self._ended is None:
            self._watch()
            if self._looking is not None:
                self._looking.cancel()
            for socket in self._others:
                socket.close(0)
            self._socket.close(200)
            self._ended = asyncio.ensure_future(asyncio.to_thread(self._context.term))  # when what was left is sent
        await asyncio.wait_for(asyncio.shield(self._ended), CLOSE_S)

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = self.loop.call_soon(self._look)

    def _look(self) -> None:
        """Read what is there. The descriptors tell once that there is something, so that nothing may be left."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        if self._ended is not None:
            return
        for socket, read in self._others.items():
            while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                read()
        batch: list[tuple[Frames, str]] = []
        with contextlib.suppress(zmq.Again):
            while len(batch) < _BATCH:
                batch.append(self._read())
            self._look_soon()
        if batch:
            self._deliver(batch)

    def _read(self) -> tuple[Frames, str]:
        *name, message = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        frames = [*(each.bytes for each in name), *unpacked(message.bytes)]
        address = message.get("Peer-Address") if self._addressed and len(frames) > 3 else ""
        return frames, str(address)


def watch(loop: asyncio.AbstractEventLoop, descriptors: list[int], look: Callable[[], None]) -> Callable[[], None]:
    """Have the loop call `look` when there is something to read, until the function that is returned is called."""
    try:
        for descriptor in descriptors:
            loop.add_reader(descriptor, look)
    except NotImplementedError:
        return _Watcher(loop, descriptors, look).end

    def end() -> None:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)

    return end


class _Watcher(threading.Thread):
    """For loops that watch no sockets: waits beside the loop, and lets it look."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptors: list[int], look: Callable[[], None]):
        super().__init__(name="zmq", daemon=True)
        self._loop, self._descriptors, self._look = loop, descriptors, look
        self._looked = threading.Semaphore(0)
        self._bell, self._rung = sockets.socketpair()
        self.start()

    def end(self) -> None:
        """Returns when it waits on none of them any more."""
        self._bell.close()
        self._looked.release()
        self.join()
        self._rung.close()

    def run(self) -> None:
        while self._rung not in select.select([*self._descriptors, self._rung], [], [])[0]:
            try:
                self._loop.call_soon_threadsafe(self._look_now)
            except RuntimeError:  # the loop has ended
                return
            self._looked.acquire()  # until then they would be ready again and again

    def _look_now(self) -> None:
        try:
            self._look()
        finally:
            self._looked.release()


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
