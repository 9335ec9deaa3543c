"""A p2pd process and raw connections to its control socket, for tests of what it says on the wire.

Knows how a daemon is started, watched and ended, and how requests, persistent connections and stream handlers work.
Blocking sockets with a deadline on every wait. Does not know which daemon it talks to, but for the secret.
"""

from __future__ import annotations

import hashlib
import os
import queue
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import p2pd_wire as wire
from free_ports import free_port

WAIT_S = 20.0
START_S = 20.0
_HANDLER_LABEL = "petals-win p2pd stream handler\n"


@dataclass(frozen=True)
class Program:
    """A p2pd to test.

    :param speaks_secret: it wants a secret on TCP control sockets (upstream's does not)
    :param tcp: use TCP for the control socket, not a Unix socket
    :param command: what to put before its arguments
    """

    name: str
    command: tuple[str, ...]
    speaks_secret: bool
    tcp: bool = False


class Closed(Exception):
    """The daemon closed the connection."""


class Refused(Exception):
    """The daemon answered with an error; the text is its own."""


class Connection:
    """A control connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    def send(self, payload: bytes) -> None:
        self.sock.sendall(wire.frame(payload))

    def receive(self) -> bytes:
        """The payload of the next frame; raises Closed at the end or a reset, TimeoutError after WAIT_S."""
        while True:
            try:
                length, start = wire.read_varint(self._buffer)
            except IndexError:
                self._fill()
                continue
            return self.take(start + length)[start:]

    def take(self, count: int) -> bytes:
        """Exactly so many raw bytes."""
        while len(self._buffer) < count:
            self._fill()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def take_all(self) -> bytes:
        """Raw bytes until the end."""
        chunks = [self._buffer]
        self._buffer = b""
        while True:
            try:
                chunk = self.sock.recv(1 << 20)
            except ConnectionError:
                chunk = b""
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)

    def _fill(self) -> None:
        try:
            chunk = self.sock.recv(1 << 20)
        except ConnectionError:
            chunk = b""
        if not chunk:
            raise Closed
        self._buffer += chunk

    def is_closed(self) -> bool:
        """Wait for the end of the connection; False if anything else comes first."""
        try:
            self.take(1)
        except Closed:
            return True
        return False

    def ask(self, kind: int, parameters: bytes | None = None) -> wire.Fields:
        """Send a request and return its Response; raises Refused for ERROR."""
        self.send(wire.request(kind, parameters))
        return self.reply()

    def reply(self) -> wire.Fields:
        response = wire.parse(self.receive())
        if response[1] != [0]:
            raise Refused(wire.one(response, 2, 1).decode())
        return response

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close so that a TCP peer sees a reset; on a Unix socket, leave unread input behind for the same effect."""
        if self.sock.family == socket.AF_INET:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Daemon:
    """A running p2pd."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        *args: str,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        ready: bool = True,
        dht: str | None = "-dhtServer=1",
        listen: str | None = "/ip4/127.0.0.1/tcp/0",
        control: str | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.program = program
        self.secret = secrets.token_hex(32) if program.tcp and program.speaks_secret else None
        if control is None:
            control = self._tcp_control(program) if program.tcp else f"/unix{folder}/{secrets.token_hex(4)}.sock"
        self.control = control
        environment = {**os.environ, "GOLOG_LOG_FMT": "json", "GOLOG_LOG_LEVEL": "error", **(env or {})}
        if self.secret:
            environment.setdefault("PETALS_WIN_P2PD_SECRET", self.secret)
        options = [f"-listen={control}", *([dht] if dht else []), *([f"-hostAddrs={listen}"] if listen else []), *args]
        self.process = subprocess.Popen(
            [*prefix, *program.command, *options],
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()
        if ready:
            self.wait_ready()

    @staticmethod
    def _tcp_control(program: Program) -> str:
        if program.speaks_secret:
            return "/ip4/127.0.0.1/tcp/0"
        return f"/ip4/127.0.0.1/tcp/{free_port()}"

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            with self._news:
                self.lines.append(raw.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self.lines.append("")  # the end
            self._news.notify_all()

    def wait_ready(self) -> None:
        """Until the line that says so has been printed; raises AssertionError with the output if that fails."""
        peer_line = self.wait_line("Peer ID: ", START_S)
        self.peer_id = wire.from_base58(peer_line.split(": ")[1])
        control_line = self.wait_line("Control socket: ", START_S)
        self.control = control_line.split(": ")[1]

    def wait_line(self, start: str, timeout_s: float = WAIT_S) -> str:
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                for line in self.lines:
                    if line.startswith(start):
                        return line
                ended = self.lines[-1:] == [""] and not self._reader.is_alive()
                if ended or not self._news.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() > deadline:
                    raise AssertionError(f"no line {start!r} in the output:\n" + "\n".join(self.lines))

    def output(self) -> list[str]:
        """All lines, once the process has ended."""
        self._reader.join(WAIT_S)
        assert not self._reader.is_alive(), "something still holds the daemon's output open"
        return [line for line in self.lines if line]

    def wait(self, timeout_s: float = WAIT_S) -> int:
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def connect(self) -> Connection:
        sock = open_socket(self.control)
        if self.secret:
            sock.sendall(self.secret.encode())
        return Connection(sock)

    def ask(self, kind: int, parameters: bytes | None = None) -> wire.Fields:
        """One request on a connection of its own, as hivemind makes them."""
        with self.connect() as connection:
            return connection.ask(kind, parameters)

    def identify(self) -> tuple[bytes, list[str]]:
        reply = wire.parse(wire.one(self.ask(wire.IDENTIFY), 4))
        return reply[1][0], [wire.address_text(raw) for raw in reply.get(2, [])]

    def full_addresses(self) -> list[str]:
        """What other daemons take as bootstrap peers."""
        return [f"{a}/p2p/{wire.base58(self.peer_id)}" for a in self.identify()[1]]

    def peers(self) -> list[tuple[bytes, str]]:
        infos = [wire.parse(raw) for raw in self.ask(wire.LIST_PEERS).get(6, [])]
        return [(info[1][0], wire.address_text(info[2][0])) for info in infos]

    def connect_to(self, other: Daemon, addresses: Iterable[str] | None = None) -> None:
        given = [wire.address(a) for a in (addresses if addresses is not None else other.identify()[1])]
        self.ask(wire.CONNECT, wire.message((1, other.peer_id), *((2, a) for a in given)))

    def persistent(self) -> Persistent:
        connection = self.connect()
        connection.ask(wire.UPGRADE)
        return Persistent(connection)

    def open_stream(self, peer: bytes, *protocols: str) -> tuple[Connection, wire.Fields]:
        """A raw stream to a peer, and its StreamInfo."""
        connection = self.connect()
        try:
            reply = connection.ask(wire.STREAM_OPEN, wire.with_protocols(peer, protocols))
        except BaseException:
            connection.close()
            raise
        return connection, wire.parse(wire.one(reply, 3))

    def add_handler(self, listener: Listener, *protocols: str, balanced: bool = False) -> None:
        self.ask(wire.STREAM_HANDLER, wire.with_protocols(listener.address, protocols, (3, balanced)))

    def remove_handler(self, listener: Listener, *protocols: str) -> None:
        self.ask(wire.REMOVE_STREAM_HANDLER, wire.with_protocols(listener.address, protocols))


def open_socket(control: str, timeout_s: float = WAIT_S) -> socket.socket:
    """A connection to a control address."""
    if control.startswith("/unix"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        sock.connect(control.removeprefix("/unix"))
        return sock
    _, _, host, _, port = control.split("/")
    sock = socket.create_connection((host, int(port)), timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Reply:
    """What came back for one call ID."""

    def __init__(self, fields: wire.Fields) -> None:
        self.fields = fields

    @property
    def done(self) -> bool:
        return set(self.fields) == {1}

    @property
    def error(self) -> str | None:
        return wire.one(self.fields, wire.DAEMON_ERROR, 1).decode() if wire.DAEMON_ERROR in self.fields else None

    @property
    def cancelled(self) -> bool:
        return self.fields.get(wire.CANCELLED) == [b""]

    @property
    def answer(self) -> wire.Fields:
        """CallUnaryResponse: field 1 response, field 2 error."""
        return wire.parse(self.fields[wire.CALL_RESPONSE][-1])


class Call:
    """A requestHandling: a call from a peer that this client is to answer."""

    def __init__(self, fields: wire.Fields) -> None:
        self.id: bytes = fields[1][0]
        call = wire.parse(fields[wire.HANDLING][0])
        self.peer: bytes = call[1][0]
        self.protocol: str = call[2][0].decode()
        self.data: bytes = call[3][0]


class Persistent:
    """An upgraded connection. Replies are kept by call ID, calls from peers and their cancellations in queues."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.calls: queue.Queue[Call] = queue.Queue()
        self.cancels: queue.Queue[bytes] = queue.Queue()
        self.ended = threading.Event()
        self._serving: set[bytes] = set()
        self._replies: dict[bytes, list[Reply]] = {}
        self._news = threading.Condition()
        self._writing = threading.Lock()
        connection.sock.settimeout(None)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                fields = wire.parse(self.connection.receive())
                call_id = fields[1][0]
                if wire.HANDLING in fields:
                    self._serving.add(call_id)
                    self.calls.put(Call(fields))
                elif wire.CANCELLED in fields and call_id in self._serving:
                    self.cancels.put(call_id)
                else:
                    with self._news:
                        self._replies.setdefault(call_id, []).append(Reply(fields))
                        self._news.notify_all()
        except (Closed, OSError):
            self.ended.set()
            with self._news:
                self._news.notify_all()

    def send(self, call_id: bytes, *oneof: tuple[int, bytes]) -> bytes:
        with self._writing:
            self.connection.send(wire.message((1, call_id), *oneof))
        return call_id

    def start(self, field: int, content: bytes, call_id: bytes | None = None) -> bytes:
        return self.send(call_id or os.urandom(16), (field, content))

    def wait(self, call_id: bytes, timeout_s: float = WAIT_S) -> Reply:
        deadline = time.monotonic() + timeout_s
        with self._news:
            while call_id not in self._replies:
                if self.ended.is_set():
                    raise Closed
                if not self._news.wait(deadline - time.monotonic()):
                    raise TimeoutError("no reply")
            return self._replies[call_id][0]

    def replies(self, call_id: bytes) -> int:
        """How many replies came for a call ID."""
        with self._news:
            return len(self._replies.get(call_id, []))

    def add(self, protocol: str, balanced: bool = False) -> Reply:
        return self.wait(self.start(wire.ADD_UNARY, wire.message((1, protocol), (2, balanced))))

    def remove(self, protocol: str) -> Reply:
        return self.wait(self.start(wire.REMOVE_UNARY, wire.message((1, protocol))))

    def start_call(self, peer: bytes, protocol: str, data: bytes = b"", call_id: bytes | None = None) -> bytes:
        return self.start(wire.CALL_UNARY, wire.message((1, peer), (2, protocol), (3, data)), call_id)

    def call(self, peer: bytes, protocol: str, data: bytes = b"", timeout_s: float = WAIT_S) -> Reply:
        return self.wait(self.start_call(peer, protocol, data), timeout_s)

    def cancel(self, call_id: bytes) -> None:
        self.send(call_id, (wire.CANCEL, b""))

    def answer(self, call: Call, response: bytes) -> None:
        self.send(call.id, (wire.UNARY_RESPONSE, wire.message((1, response))))

    def answer_error(self, call: Call, error: bytes) -> None:
        self.send(call.id, (wire.UNARY_RESPONSE, wire.message((2, error))))

    def next_call(self, timeout_s: float = WAIT_S) -> Call:
        return self.calls.get(timeout=timeout_s)

    def next_cancel(self, timeout_s: float = WAIT_S) -> bytes:
        return self.cancels.get(timeout=timeout_s)

    def serve(self, handler: Callable[[Call], bytes]) -> None:
        """Answer every call from here on, in a thread of its own."""

        def loop() -> None:
            while not self.ended.is_set():
                try:
                    call = self.calls.get(timeout=0.2)
                except queue.Empty:
                    continue
                self.answer(call, handler(call))

        threading.Thread(target=loop, daemon=True).start()

    def close(self) -> None:
        # Not just close: the reading thread is inside recv, and keeps the socket alive.
        try:
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.connection.close()
        self.ended.wait(WAIT_S)

    def __enter__(self) -> Persistent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Listener:
    """The address that a client gives for its stream handlers."""

    def __init__(self, daemon: Daemon, folder: Path, tcp: bool = False) -> None:
        self._secret = None
        if tcp or daemon.program.tcp:
            self.sock = socket.create_server(("127.0.0.1", 0))
            self.text = f"/ip4/127.0.0.1/tcp/{self.sock.getsockname()[1]}"
            if daemon.secret:
                self._secret = hashlib.sha256((_HANDLER_LABEL + daemon.secret).encode()).hexdigest().encode()
        else:
            path = folder / f"{secrets.token_hex(4)}.sock"
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.bind(str(path))
            self.sock.listen(100)
            self.text = f"/unix{path}"
        self.sock.settimeout(WAIT_S)
        self.address = wire.address(self.text)

    def accept(self) -> tuple[Connection, wire.Fields]:
        """The next stream, and the StreamInfo that it opens with."""
        sock, _ = self.sock.accept()
        sock.settimeout(WAIT_S)
        connection = Connection(sock)
        if self._secret:
            assert connection.take(len(self._secret)) == self._secret
        return connection, wire.parse(connection.receive())

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


NAME = "Test.call"


def serve(daemon: Daemon, name: str = NAME) -> Persistent:
    """A client of the daemon with one handler."""
    persistent = daemon.persistent()
    assert persistent.add(name).done
    return persistent
