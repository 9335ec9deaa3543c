"""Calls over ZeroMQ: a ROUTER at the worker, a DEALER at each caller, CURVE between them.

Knows pyzmq. Does not know what requests and replies mean.

Frames from a caller (as `zmq_pump.packed` puts them into one of ZeroMQ's), each message with a kind first:
    Q NUMBER METHOD REQUEST     a call; its number is the caller's choice
    X NUMBER                    it is given up
    C NUMBER                    half of a window of replies was read: so many more may come
    P                           the caller lives, said each second
    B                           goodbye
and from the worker:
    R NUMBER REPLY
    E NUMBER REASON             no more replies; with a reason, the call was not taken

Callers prove themselves by a key pair that is made of the shared key (ZAP, RFC 27); the worker has one of its own, which callers have pinned.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from petals_win.errors import UserError, printable
from petals_win.host.ports import check_port_free
from petals_win.jobs.failures import LinkLost, LinkRefused
from petals_win.jobs.keys import OwnSecrets, curve_of_callers, curve_public
from petals_win.jobs.links import CLOSE_S, CONNECT_S, MOST_CALLS, Address, Answer
from petals_win.jobs.model import METHODS
from petals_win.jobs.zmq_pump import Frames, Pump, new_socket, plain, tcp

logger = logging.getLogger(__name__)

_WINDOW = 64  # replies under way to a caller, for each call
_PING_S = 1.0
_MOST_SILENT = 6  # pings; counted, so that a PC that slept does not take its callers for gone
_MOST_STRANGERS = 256
_HANDSHAKES = {
    zmq.Event.HANDSHAKE_SUCCEEDED: "",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "{} refuses the key. Copy the key file of that worker to this PC.",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: (
        "{} is no worker, or has another public key than the one that is named behind the #. If it was set up anew, take the address "
        "that it prints now."
    ),
}


def new_door(secrets: OwnSecrets) -> ZmqDoor:
    return ZmqDoor(secrets)


class ZmqDoor:
    """A Door."""

    def __init__(self, secrets: OwnSecrets):
        self.pin = secrets.pin("zmq")
        self._secrets = secrets
        self._pump: Pump | None = None
        self._calls: dict[tuple[bytes, bytes], _Served] = {}
        self._silent: dict[bytes, int] = {}  # pings that each caller has left out
        self._strangers: set[str] = set()

    async def open(self, host: str, port: int, answer: Answer) -> int:
        if port:
            check_port_free(host, port)
        context = zmq.Context()
        socket = new_socket(context, zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, 0)  # windows bound what is sent
        socket.setsockopt(zmq.RCVHWM, 16)
        socket.curve_server, socket.curve_secretkey = True, self._secrets.curve
        gate = context.socket(zmq.REP)
        gate.bind("inproc://zeromq.zap.01")
        try:
            socket.bind(tcp(host, port or "*"))
        except zmq.ZMQError as e:
            context.destroy(0)
            raise UserError(
                f"Nothing can listen on {host}, port {port}: {e.strerror}. Choose another with --listen."
            ) from e
        bound = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._answer = answer
        known = curve_public(curve_of_callers(self._secrets.key))
        self._pump = Pump(context, socket, self._came, self._forget, {gate: lambda: self._judge(gate, known)})
        self._sweeping = asyncio.create_task(self._sweep())
        return bound

    def _judge(self, gate: zmq.Socket, known: bytes) -> None:
        """Let in whoever has the key of callers."""
        version, number, _domain, address, _identity, mechanism, *proof = gate.recv_multipart()
        right = mechanism == b"CURVE" and proof == [known]
        status = (b"200", b"OK", b"caller", b"") if right else (b"400", b"wrong key", b"", b"")
        gate.send_multipart([version, number, *status])
        if not right:
            stranger = plain(address.decode(errors="replace"))
            if stranger not in self._strangers and len(self._strangers) < _MOST_STRANGERS:
                self._strangers.add(stranger)
                logger.warning("%s is refused: it has no key, or a wrong one. Said once for each address.", stranger)

    def _came(self, batch: list[tuple[Frames, str]]) -> None:
        for (caller, *frames), address in batch:
            self._silent[caller] = 0
            match frames:
                case [b"Q", number, method, request] if len(number) == 8 and (caller, number) not in self._calls:
                    self._begin(caller, number, method, request, address)
                case [b"X", number]:
                    self._give_up((caller, number))
                case [b"C", number]:
                    if (call := self._calls.get((caller, number))) is not None:
                        call.more()
                case [b"B"]:
                    self._forget(caller)

    def _begin(self, caller: bytes, number: bytes, method: bytes, request: bytes, address: str) -> None:
        assert self._pump is not None
        name = method.decode(errors="replace")
        if len(self._calls) >= MOST_CALLS or name not in METHODS:
            reason = f"{len(self._calls)} calls run already" if name in METHODS else "it does not know the call"
            self._pump.send([caller, b"E", number, reason.encode()])
            return
        replies = self._answer(name, request, plain(address))
        call = self._calls[caller, number] = _Served(self._pump, caller, number, replies)
        call.task.add_done_callback(lambda _: self._calls.pop((caller, number), None))

    def _give_up(self, which: tuple[bytes, bytes]) -> None:
        if (call := self._calls.get(which)) is not None:
            call.task.cancel()

    def _forget(self, caller: bytes) -> None:
        self._silent.pop(caller, None)
        for which in [which for which in self._calls if which[0] == caller]:
            self._give_up(which)

    async def _sweep(self) -> None:
        """End the calls of callers that are silent."""
        while True:
            await asyncio.sleep(_PING_S)
            for caller in list(self._silent):
                self._silent[caller] += 1
                if self._silent[caller] > _MOST_SILENT:
                    self._forget(caller)

    async def drain(self) -> None:
        """The state that callers watch says it."""

    async def close(self) -> None:
        if self._pump is None:
            return
        self._sweeping.cancel()
        tasks = [call.task for call in self._calls.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        await self._pump.stop()


class _Served:
    """A call at the worker: a task that sends replies as far as the window is open."""

    def __init__(self, pump: Pump, caller: bytes, number: bytes, replies: AsyncGenerator[bytes, None]):
        self._window, self._open = _WINDOW, asyncio.Event()
        self.task = asyncio.create_task(self._serve(pump, caller, number, replies))

    def more(self) -> None:
        self._window = min(self._window + _WINDOW // 2, _WINDOW)
        self._open.set()

    async def _serve(self, pump: Pump, caller: bytes, number: bytes, replies: AsyncGenerator[bytes, None]) -> None:
        try:
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    while not self._window:
                        self._open.clear()
                        await self._open.wait()
                    self._window -= 1
                    pump.send([caller, b"R", number, reply])
            pump.send([caller, b"E", number, b""])
        except asyncio.CancelledError:
            pump.send([caller, b"E", number, b"the call was broken off"])
            raise


async def connect(address: Address, key: str) -> ZmqLink:
    """Raises LinkLost if nobody answers, LinkRefused if one of the two does not prove itself."""
    link = ZmqLink(address, key)
    try:
        await asyncio.wait_for(asyncio.shield(link.let_in), CONNECT_S)
    except TimeoutError as e:
        await link.close()
        raise LinkLost(f"{address} cannot be reached: no answer in time.") from e
    except BaseException:
        await link.close()
        raise
    return link


class ZmqLink:
    """A Link."""

    def __init__(self, address: Address, key: str):
        self._address = address
        self._numbers = itertools.count(1)
        self._calls: dict[bytes, asyncio.Queue[bytes | LinkLost | None]] = {}
        self._lost: LinkLost | None = None
        context = zmq.Context()
        socket = new_socket(context, zmq.DEALER)
        private = curve_of_callers(key)
        socket.curve_secretkey, socket.curve_publickey = private, curve_public(private)
        socket.curve_serverkey = bytes.fromhex(address.pin or "00" * 32)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a lost link is lost: what ran on it is not there any more
        socket.setsockopt(zmq.IMMEDIATE, 1)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | sum(_HANDSHAKES))
        self.let_in: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        events = {monitor: lambda: self._happened(parse_monitor_message(monitor.recv_multipart()))}
        self._pump = Pump(context, socket, self._came, self._ignore, events)
        socket.connect(tcp(address.host, address.port))
        self._pinging = asyncio.create_task(self._ping())

    def _happened(self, what: Any) -> None:
        refused = _HANDSHAKES.get(what["event"])
        if refused:
            self._lose(LinkRefused(refused.format(self._address)))
        elif refused is None:
            self._lose(LinkLost(f"The connection to {self._address} is lost, or there is none."))
        elif not self.let_in.done():
            self.let_in.set_result(None)

    def _lose(self, why: LinkLost) -> None:
        self._lost = self._lost or why
        if not self.let_in.done():
            self.let_in.set_exception(why)
        for replies in self._calls.values():
            replies.put_nowait(self._lost)

    def _came(self, batch: list[tuple[Frames, str]]) -> None:
        for frames, _ in batch:
            match frames:
                case [b"R", number, reply] if number in self._calls:
                    self._calls[number].put_nowait(reply)
                case [b"E", number, reason] if number in self._calls:
                    said = printable(reason.decode(errors="replace"))
                    self._calls[number].put_nowait(
                        LinkLost(f"{self._address} did not answer: {said}.") if said else None
                    )

    def _ignore(self, _: bytes) -> None:
        """What could not be sent: that the link is lost is told by the monitor."""

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            self._pump.send([b"P"])

    async def call(self, method: str, request: bytes, seconds: float) -> AsyncGenerator[bytes, None]:
        if self._lost is not None:
            raise self._lost
        number, replies = next(self._numbers).to_bytes(8, "big"), asyncio.Queue[bytes | LinkLost | None]()
        self._calls[number] = replies
        late = LinkLost(f"{self._address} did not answer in time.")
        deadline = self._pump.loop.call_later(seconds, replies.put_nowait, late)
        reply: bytes | LinkLost | None = b""
        try:
            self._pump.send([b"Q", number, method.encode(), request])
            for count in itertools.count(1):
                reply = await replies.get()
                if reply is None:
                    return
                if isinstance(reply, LinkLost):
                    raise reply
                if count % (_WINDOW // 2) == 0:
                    self._pump.send([b"C", number])
                yield reply
        finally:
            deadline.cancel()
            del self._calls[number]
            if reply is not None and self._lost is None:
                self._pump.send([b"X", number])

    async def close(self) -> None:
        self._lose(LinkLost(f"The connection to {self._address} is closed."))
        self.let_in.exception()  # seen: whoever waited has been told
        self._pinging.cancel()
        self._pump.send([b"B"])
        await self._pump.stop()
