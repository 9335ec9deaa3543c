"""One run of a program that answers one question: it is given a text, and what it writes is the answer.

Knows the process, and how its output gets to the event loop. Does not know requests.
"""

from __future__ import annotations

import asyncio
import codecs
import threading
from collections.abc import AsyncGenerator, Sequence

from petals_win.engines.command_file import Described
from petals_win.engines.outside import ProgramFailed, ProgramUnavailable
from petals_win.errors import UserError
from petals_win.host.programs import ErrorLog, InputFull, Program

_AHEAD = 16  # pieces on their way to the event loop, of at most 64 KiB; while there are so many, no more are read


class Run:
    """`pieces` starts the program, and `end` has to be called behind it, whatever happened."""

    def __init__(self, described: Described, argv: Sequence[str], given: str | None):
        """given: what it reads from its standard input."""
        self._described, self._argv, self._given = described, argv, given
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[bytes | int | UserError] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._left = False
        self._errors = ErrorLog(described.program)
        self._over = asyncio.Event()
        self._starting: asyncio.Future[Program] | None = None

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Whole characters as they come, up to the orderly end of the program.

        Raises ProgramUnavailable if it cannot be started, ProgramFailed if it fails, is silent for too long or writes too much,
        and what `break_off` was given.
        """
        limits, named = self._described.limits, self._described.named.capitalize()
        self._starting = asyncio.ensure_future(asyncio.to_thread(self._start))
        await asyncio.shield(self._starting)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        patience, length = limits.first_token_seconds, 0
        while True:
            try:
                async with asyncio.timeout(patience):
                    came = await self._inbox.get()
            except TimeoutError:
                raise ProgramFailed(f"{named} has written nothing for {patience:g} s. Try again.") from None
            if isinstance(came, UserError):
                raise came
            if isinstance(came, int):
                if came != 0:
                    raise ProgramFailed(
                        f"{named} has failed: it ended with status {came}. Its lines in the log tell more."
                    )
                if rest := decoder.decode(b"", final=True):
                    yield rest
                return
            self._room.release()
            length += len(came)
            if length > limits.answer_bytes:
                raise ProgramFailed(
                    f"{named} has written more than the {limits.answer_bytes} bytes of an answer (answer_bytes)."
                )
            patience = limits.token_seconds
            if text := decoder.decode(came):
                yield text

    def break_off(self, why: UserError) -> None:
        """`pieces` raises it, once it has told what came before."""
        self._inbox.put_nowait(why)

    async def end(self) -> None:
        """Afterwards it does not run any more. Must not be cancelled."""
        self._left = True
        self._room.release(_AHEAD)  # nobody takes pieces any more
        if self._starting is None:
            return
        try:
            program = await self._starting
        except UserError:
            return
        program.kill()
        await self._over.wait()

    def _start(self) -> Program:
        try:
            program = Program(
                self._argv,
                folder=self._described.working_folder,
                env=self._described.env(),
                on_output=self._output,
                on_error=self._errors.feed,
                on_end=self._ended,
            )
        except OSError as e:
            raise ProgramUnavailable(f"{self._argv[0]} cannot be started: {e.strerror or e}.") from e
        try:
            program.write(b"" if self._given is None else self._given.encode("utf-8", "replace"))
        except InputFull:
            self._tell(UserError("The prompt is too long for the program that answers."))
        program.close_input()
        return program

    def _output(self, data: bytes) -> None:
        if not self._left:
            self._room.acquire()
            self._tell(data)

    def _ended(self, status: int) -> None:
        self._errors.flush()
        self._tell(status)

    def _tell(self, what: bytes | int | UserError) -> None:
        def take() -> None:
            self._inbox.put_nowait(what)
            if isinstance(what, int):
                self._over.set()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(take)
