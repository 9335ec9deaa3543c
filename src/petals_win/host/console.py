"""The terminal, or what stands in for it: a pipe, a log file, a CI run.

Knows encodings and how progress is shown. Does not know what is in progress.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

_REPORT_EVERY_S = 10.0


def use_utf8() -> None:
    """Read and write UTF-8 whatever the code page is; what cannot be shown is replaced, never an error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def size_text(size: float) -> str:
    """A number of bytes for people, e.g. 92.9 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


class Progress:
    """Shows one step after another, each with its size and time: a moving line on a terminal, timed lines elsewhere.

    A context, whose end ends the last step. Its methods may be called from any thread.
    """

    def __init__(self, stream: TextIO | None = None):
        """:param stream: where to show it; standard error if None, so that a command's result can be piped on"""
        self._console = Console(file=stream, stderr=stream is None, highlight=False)
        self._lock = threading.Lock()
        self._step: _Step | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        if not self._console.is_terminal:
            threading.Thread(target=self._report, name="progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        with self._lock:
            self._end_step("done" if kind is None else "stopped" if kind is KeyboardInterrupt else "failed")

    def step(self, what: str, total: int | None = None) -> None:
        """The step before is done, this one begins.

        :param what: what is being done, e.g. "Fetching SmolLM2-135M-Instruct"
        :param total: its size in bytes, if it is known
        """
        with self._lock:
            self._end_step("done")
            self._step = _Step(what, total, self._console if self._console.is_terminal else None)
            if not self._console.is_terminal:
                self._say(what + (f" ({size_text(total)})" if total else ""))

    def advance(self, size: int) -> None:
        """`size` more bytes of the step are done."""
        with self._lock:
            if self._step is not None:
                self._step.advance(size)

    def detail(self, *words: str) -> None:
        """What is going on within the step, e.g. a line that a child process printed."""
        text = " ".join(words)
        with self._lock:
            if not self._console.is_terminal:
                self._say(f"  {text}")
            elif self._step is not None:
                self._step.show(text)

    def note(self, text: str) -> None:
        """Something that the user must see, now and later, such as an error of a child process."""
        with self._lock:
            self._say(text)

    def done(self, text: str) -> None:
        """The last step is done; `text` is its result."""
        with self._lock:
            self._end_step("done")
            self._say(text)

    def _end_step(self, how: str) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.close()
            self._say(f"{step.what}: {how}{step.size_text()}, {step.seconds:.1f} s")

    def _say(self, text: str) -> None:
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(stamp + text, markup=False, soft_wrap=True)

    def _report(self) -> None:
        # Whoever reads a log must be able to tell slow from stuck.
        while not self._ended.wait(_REPORT_EVERY_S):
            with self._lock:
                if self._step is not None and self._step.seconds >= _REPORT_EVERY_S:
                    self._say(f"{self._step.what}: {self._step.seconds:.0f} s{self._step.size_text()}")


class _Step:
    """One step, with its moving line if there is a terminal for it."""

    def __init__(self, what: str, total: int | None, terminal: Console | None):
        self.what, self._total, self._size = what, total, 0
        self._began = time.monotonic()
        self._bar: Bar | None = None
        if terminal is not None:
            sizes = [] if total is None else [BarColumn(bar_width=24), DownloadColumn()]
            one_line = Column(no_wrap=True, overflow="ellipsis")
            text = TextColumn("{task.description}", markup=False, table_column=one_line)
            self._bar = Bar(SpinnerColumn(), TimeElapsedColumn(), *sizes, text, console=terminal, transient=True)
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def size_text(self) -> str:
        if not self._size:
            return ""
        of = f" of {size_text(self._total)}" if self._total and self._total != self._size else ""
        return f", {size_text(self._size)}{of}"

    def advance(self, size: int) -> None:
        self._size += size
        if self._bar is not None:
            self._bar.advance(self._task, size)

    def show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self.what}: {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
