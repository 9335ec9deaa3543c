"""Encodings, and progress on a terminal and elsewhere."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from petals_win.host import console
from petals_win.host.console import Progress, size_text


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sizes_are_for_people():
    assert [size_text(n) for n in (0, 999, 1000, 92_871_040, 2_500_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "92.9 MB",
        "2.5 GB",
    ]


def test_text_survives_any_code_page():
    program = "from petals_win.host.console import use_utf8; use_utf8(); print(input() + ' ≈ 12 €')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp437", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], input="Größe\n".encode(), env=environment, capture_output=True
    )
    assert done.stdout.decode("utf-8").strip() == "Größe ≈ 12 €"


def test_plain_lines_have_time_size_and_elapsed(monkeypatch):
    # A busy PC needs a tenth of a second for this. Not the clock of the module time: event loops of other threads have that.
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: 100.0, strftime=time.strftime))
    out = io.StringIO()
    with Progress(out) as progress:
        progress.step("Fetching a model", 92_900_000)
        progress.advance(50_000_000)
        progress.detail("0:15", "loaded")
        progress.advance(42_900_000)
        progress.step("Starting")
        progress.done("It answers at http://127.0.0.1:8000")
    lines = out.getvalue().splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "Fetching a model (92.9 MB)",
        "  0:15 loaded",
        "Fetching a model: done, 92.9 MB, 0.0 s",
        "Starting",
        "Starting: done, 0.0 s",
        "It answers at http://127.0.0.1:8000",
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)


def test_a_long_step_says_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(console, "_REPORT_EVERY_S", 0.1)
    out = io.StringIO()
    with Progress(out) as progress:
        progress.step("Waiting")
        wait_for(lambda: re.search(r"Waiting: \d+ s\n", out.getvalue()))


def test_a_step_that_fails_is_not_called_done():
    out = io.StringIO()
    with pytest.raises(ValueError), Progress(out) as progress:
        progress.step("Starting")
        raise ValueError
    assert "Starting: failed" in out.getvalue() and "done" not in out.getvalue()


def test_a_terminal_gets_one_moving_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with Progress(out) as progress:
        progress.step("Fetching", 1000)
        progress.advance(1000)
        progress.detail("[not markup]")
        wait_for(lambda: "[not markup]" in out.getvalue())
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "Fetching: [not markup]" in text
    assert text.rstrip().splitlines()[-1].startswith("Fetching: done, 1.0 kB")
