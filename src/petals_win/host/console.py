"""The terminal, or what stands in for it: a pipe, a log file, a CI run.

Knows encodings and how progress is shown. Does not know what is in progress.
"""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

_REPORT_EVERY_S = 5.0


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


class Step:
    """One thing in progress. Made by `Progress.step`; use it from one thread at a time."""

    def __init__(self, what: str, total: int | None):
        self.what, self.total, self.done = what, total, 0
        self.began = time.monotonic()

    def advance(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size

    def note(self, text: str) -> None:
        """Say what is being done now within the step."""

    def finish(self) -> str:
        """The line that remains of the step."""
        size = f", {size_text(self.total or self.done)}" if self.total or self.done else ""
        return f"{self.what}: done{size}, {time.monotonic() - self.began:.1f} s"


class Progress:
    """Shows steps as they go: a moving line on a terminal, timed lines anywhere else."""

    def __init__(self, stream: TextIO | None = None):
        """:param stream: where to show it; standard error if None, so that a command's result can be piped on"""
        self._console = Console(file=stream, stderr=stream is None, highlight=False)

    def say(self, text: str) -> None:
        """Show one line."""
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(stamp + text, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, what: str, total: int | None = None) -> Iterator[Step]:
        """Show one step for the length of a with block, one at a time.

        :param what: what is being done, e.g. "Fetch the model SmolLM2-135M-Instruct"
        :param total: its size in bytes, if it is known
        """
        if self._console.is_terminal:
            columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
            if total is not None:
                columns[2:2] = [BarColumn(bar_width=24), DownloadColumn()]
            with RichProgress(*columns, console=self._console, transient=True) as bar:
                step: Step = _LiveStep(what, total, bar)
                yield step
        else:
            self.say(what + (f" ({size_text(total)})" if total else ""))
            step = _PlainStep(what, total, self)
            yield step
        self.say(step.finish())


class _LiveStep(Step):
    def __init__(self, what: str, total: int | None, bar: RichProgress):
        super().__init__(what, total)
        self._bar = bar
        self._task: TaskID = bar.add_task(what, total=total)

    def advance(self, size: int) -> None:
        super().advance(size)
        self._bar.advance(self._task, size)

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=f"{self.what}: {text}")


class _PlainStep(Step):
    def __init__(self, what: str, total: int | None, progress: Progress):
        super().__init__(what, total)
        self._progress = progress
        self._next_report = self.began + _REPORT_EVERY_S

    def advance(self, size: int) -> None:
        super().advance(size)
        now = time.monotonic()
        if now >= self._next_report:
            self._next_report = now + _REPORT_EVERY_S
            of = f" of {size_text(self.total)}" if self.total else ""
            self._progress.say(f"{self.what}: {size_text(self.done)}{of}, {now - self.began:.0f} s")

    def note(self, text: str) -> None:
        self._progress.say(f"{self.what}: {text}")
