"""One life of a runtime that speaks the dialect "jsonl": its process, the handshake, and messages both ways.

Knows the process and the protocol's frame. Does not know requests, nor what happens when a life is over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from petals_win.engines.command_file import Described
from petals_win.engines.command_messages import VERSION, Failure, Hello, Loaded, Message, Violation, read_message
from petals_win.errors import UserError, printable
from petals_win.host.programs import ErrorLog, InputFull, Lines, Program

logger = logging.getLogger(__name__)

_AHEAD = 256  # messages on their way to the event loop; while there are so many, no more are read
_GRACE_S = 2.0  # for an orderly end


class Link:
    """A process that has been started. `shake_hands` is next; then `attach`."""

    def __init__(self, described: Described):
        """Raises UserError if it cannot be started."""
        self.described = described
        self.heard = time.monotonic()  # when the last message came
        self.why: str | None = None  # it is over
        self.failed = False  # because of what it did: nothing that it says counts any more
        self._lines = Lines(described.limits.line_bytes)
        self._inbox: queue.Queue[Message | None] = queue.Queue(_AHEAD)
        self._room = threading.Semaphore(_AHEAD)
        self._lock = threading.Lock()
        self._to_loop: Callable[[Message | None], None] | None = None
        self._errors = ErrorLog(described.program)
        folder, argv = described.working_folder, described.argv()
        try:
            self._program = Program(
                argv,
                folder=folder,
                env=described.env(),
                on_output=self._output,
                on_error=self._errors.feed,
                on_end=self._ended,
            )
        except OSError as e:
            raise UserError(f"{argv[0]} cannot be started: {e.strerror or e}.") from e

    @property
    def pid(self) -> int:
        return self._program.pid

    def shake_hands(self) -> tuple[Hello, dict[str, int]]:
        """What the runtime says of itself, and the context of each model, which are loaded then. Blocks.

        Raises UserError, and ends the process, if it does not answer as it should.
        """
        try:
            deadline = time.monotonic() + self.described.limits.start_seconds
            self.send({"type": "hello", "version": VERSION})
            hello = self._next(deadline, Hello)
            if hello.version != VERSION:
                raise Violation(f"it speaks version {hello.version} of the protocol, and petals-win speaks {VERSION}")
            contexts: dict[str, int] = {}
            for model in self.described.models:
                self.send({"type": "load", "model": model.name, "settings": model.settings})
                loaded = self._next(deadline, Loaded)
                if loaded.model != model.name:
                    raise Violation(f"it loaded {printable(loaded.model)!r} instead of {model.name!r}")
                known = [length for length in (model.context_length, loaded.context_length) if length is not None]
                if not known:
                    raise Violation(
                        f"it does not tell the context_length of {model.name}, and the file does not either"
                    )
                contexts[model.name] = min(known)
            return hello, contexts
        except Violation as e:
            self.fail(str(e))
            raise UserError(
                f"{self.described.named.capitalize()} cannot be used: {e}. Its log lines tell more."
            ) from None
        except BaseException:
            self._program.kill()
            raise

    def attach(self, loop: asyncio.AbstractEventLoop, take: Callable[[Message | None], None]) -> None:
        """From now on `take` is called on the loop with each message, and with None when the life is over."""

        def handle(message: Message | None) -> None:
            self._room.release()
            take(message)

        def to_loop(message: Message | None) -> None:
            if message is not None:
                self._room.acquire()
            if not loop.is_closed():
                loop.call_soon_threadsafe(handle, message)

        with self._lock:
            self._to_loop = to_loop
            while not self._inbox.empty():
                to_loop(self._inbox.get_nowait())

    def send(self, message: dict[str, Any]) -> None:
        """Returns at once; of a life that is over nobody reads it."""
        try:
            # In ASCII: no runtime can take another character for the end of a line.
            self._program.write(json.dumps(message).encode("ascii") + b"\n")
        except InputFull:
            self.fail("it does not read what it is sent")

    def fail(self, why: str) -> None:
        """End this life by force, since the runtime does not do as it should."""
        if self.why is None:
            logger.warning("%s is ended: %s", self.described.named.capitalize(), why)
            self.why = why
        self.failed = True
        self._program.kill()

    def stop(self) -> None:
        """End this life in order. Blocks for seconds at most."""
        self.why = self.why or "it was ended"
        self._room.release(_AHEAD)  # nobody takes messages any more
        self._program.stop(_GRACE_S)

    def _next(self, deadline: float, kind: type[Any]) -> Any:
        while True:
            try:
                message = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                seconds = self.described.limits.start_seconds
                raise Violation(f"it did not answer within {seconds:g} s (start_seconds)") from None
            if isinstance(message, kind):
                return message
            if isinstance(message, Failure):
                raise Violation(f"it says: {printable(message.message).rstrip('.')}")
            if message is None:
                raise Violation(self.why or "it has ended")
            raise Violation(f"it sent {message.type!r} where {kind.__name__.lower()!r} was due")

    def _output(self, data: bytes) -> None:
        if self.why is not None:
            return
        try:
            messages = [read_message(line) for line in self._lines.feed(data) if line.strip()]
        except (Violation, ValueError) as e:
            self.fail(str(e) if isinstance(e, Violation) else f"it sent {e}")
            return
        self.heard = time.monotonic()
        for message in messages:
            self._pass_on(message)

    def _ended(self, status: int) -> None:
        self._errors.flush()
        if self.why is None:
            self.why = f"it has ended with status {status}"
        self._pass_on(None)

    def _pass_on(self, message: Message | None) -> None:
        with self._lock:
            to_loop = self._to_loop
            if to_loop is None:
                try:
                    self._inbox.put_nowait(message)
                except queue.Full:
                    self._inbox.get_nowait()
                    self._inbox.put_nowait(None)
                    self.why = self.why or "it talks without being asked"
                    self._program.kill()
                return
        to_loop(message)
