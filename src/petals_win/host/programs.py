"""Programs of others as children: bytes in, bytes out, and an end that takes whatever they have started along.

Knows pipes, threads and the means by which children end with this process (`petals_win.host.children`), none of which asks
a stranger's program to do anything. Works from any thread, with or without an event loop. Does not know what is said.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from petals_win.host.children import die_with_this_thread
from petals_win.host.process_tree import ProcessTree

logger = logging.getLogger(__name__)

# As `argument_length` counts; systems bound one argument (Linux, 128 KiB) or the whole command line (Windows, 32,767 units of UTF-16).
LONGEST_ARGUMENT = 30_000 if sys.platform == "win32" else 120_000
_CHUNK = 2**16
_MOST_UNREAD = 64 * 2**20  # bytes that the program has been sent and has not taken
_LAST_OUTPUT_S = 2.0  # for what is still in the pipes when the program has ended


def argument_length(text: str) -> int:
    """The bytes that a text takes as an argument; on Windows, where quotes take more than one character, at least as many as units."""
    return len((subprocess.list2cmdline([text]) if sys.platform == "win32" else text).encode())


class InputFull(Exception):
    """The program does not read what it is sent."""


class Program:
    """A running program. Its callbacks are called on threads of its own.

    on_output: the next bytes of its standard output; while it has not returned, no more are read.
    on_error: the next bytes of its standard error.
    on_end: the exit status (on POSIX minus the number of the signal), once, when the output is at its end, too.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        folder: Path,
        env: Mapping[str, str],
        on_output: Callable[[bytes], None],
        on_error: Callable[[bytes], None],
        on_end: Callable[[int], None],
    ):
        """Raises OSError if it cannot be started."""
        self._argv, self._folder, self._env = list(argv), folder, dict(env)
        self._on_output, self._on_error, self._on_end = on_output, on_error, on_end
        self._input: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._unread = 0
        self._lock = threading.Lock()
        self._tree = ProcessTree()
        self._failed: OSError | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._process: subprocess.Popen[Any] | None = None
        # The thread that starts the program lives as long as the program: on Linux one ends with the other.
        threading.Thread(target=self._run, name=f"program {Path(argv[0]).name}", daemon=True).start()
        self._started.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def write(self, data: bytes) -> None:
        """Send bytes to its standard input; returns at once. Raises InputFull, and does nothing if the program has ended."""
        with self._lock:
            if self._unread + len(data) > _MOST_UNREAD:
                raise InputFull
            self._unread += len(data)
        self._input.put(data)

    def close_input(self) -> None:
        """Its standard input ends behind what was sent so far."""
        self._input.put(None)

    def kill(self) -> None:
        """End it, and whatever it has started, at once."""
        with self._lock:
            if not self._ended.is_set():
                with suppress(OSError):  # it has ended by itself
                    self._tree.kill()

    def stop(self, timeout: float) -> None:
        """End its input, and end it by force if that does not within `timeout` seconds. Blocks; safe to call twice."""
        self.close_input()
        if not self._ended.wait(timeout):
            self.kill()
            self._ended.wait(_LAST_OUTPUT_S + 5)

    def _run(self) -> None:
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
        pipe = subprocess.PIPE
        try:
            process: subprocess.Popen[Any] = subprocess.Popen(
                die_with_this_thread(self._argv),
                cwd=self._folder,
                env=self._env,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                bufsize=0,
                **options,
            )
        except (OSError, ValueError) as e:  # such as a zero byte in an argument
            self._failed = e if isinstance(e, OSError) else OSError(str(e))
            self._tree.close()
            self._started.set()
            return
        self._process = process
        try:
            self._tree.add(process.pid)
        except OSError as e:
            logger.warning("Process %d is in no job object: %s", process.pid, e)
        self._started.set()  # not before: `kill` ends what is in the tree
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            (self._pass_on, (process.stdout, self._on_output)),
            (self._pass_on, (process.stderr, self._on_error)),
        ]
        readers = [threading.Thread(target=target, args=args, daemon=True) for target, args in work]
        writer = threading.Thread(target=self._send, args=(process.stdin,), daemon=True)
        for thread in (*readers, writer):
            thread.start()
        status = process.wait()
        deadline = time.monotonic() + _LAST_OUTPUT_S
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            with suppress(OSError):
                self._tree.kill()  # what it has left behind, and what may hold the pipes
            self._tree.close()
            self._ended.set()
        self._input.put(None)
        for reader in readers:
            reader.join(0.5)
        self._on_end(status)

    def _pass_on(self, pipe: IO[bytes], take: Callable[[bytes], None]) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), _CHUNK):
                take(data)

    def _send(self, pipe: IO[bytes]) -> None:
        with suppress(OSError), pipe:  # it has ended, or has closed its input
            while (data := self._input.get()) is not None:
                view = memoryview(data)
                while view:
                    view = view[pipe.write(view) :]
                with self._lock:
                    self._unread -= len(data)


class Lines:
    """Cuts bytes into lines, of at most `longest` bytes: what is longer is known before more memory is taken."""

    def __init__(self, longest: int):
        self._longest = longest
        self._part = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends. Raises ValueError for one that is too long."""
        self._part += data
        *lines, rest = self._part.split(b"\n")
        self._part = rest
        if max(map(len, (*lines, rest))) > self._longest:
            raise ValueError(f"a line of more than {self._longest} bytes")
        return [bytes(line) for line in lines]

    def rest(self) -> bytes:
        """What is left behind the last end of a line."""
        rest, self._part = bytes(self._part), bytearray()
        return rest


class ErrorLog:
    """What a program says on its standard error, in the log: so many lines a second, each cut to a bearable length."""

    def __init__(self, name: str, on_line: Callable[[str], None] | None = None):
        self._name, self._on_line = name, on_line
        self._part = b""
        self._allowed, self._at, self._left_out = float(_BURST), time.monotonic(), 0

    def feed(self, data: bytes) -> None:
        *lines, rest = (self._part + data).split(b"\n")
        self._part = rest[:_LONGEST_LOGGED]
        for line in lines:
            self._say(line)

    def flush(self) -> None:
        if self._part:
            self._say(self._part)
            self._part = b""

    def _say(self, line: bytes) -> None:
        text = line[:_LONGEST_LOGGED].decode(errors="replace")
        text = "".join(c if c.isprintable() else " " for c in text).strip()
        if not text:
            return
        if self._on_line is not None:
            self._on_line(text)
        now = time.monotonic()
        self._allowed = min(_BURST, self._allowed + (now - self._at) * _LINES_PER_S)
        self._at = now
        if self._allowed < 1:
            self._left_out += 1
            return
        self._allowed -= 1
        if self._left_out:
            logger.warning("%s said %d lines more than are kept", self._name, self._left_out)
            self._left_out = 0
        logger.info("%s: %s", self._name, text)


_BURST, _LINES_PER_S = 100, 10
_LONGEST_LOGGED = 500  # bytes
