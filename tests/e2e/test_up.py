"""`petals-win up` as a user runs it: it answers, and whatever ends it, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from free_ports import free_port

ENDINGS = ["SIGTERM", "SIGINT"]  # and "kill", as test_four_bits.py does it
if sys.platform == "win32":
    mark = pytest.mark.wine_lacks("a console to press Ctrl+Break in")
    ENDINGS = [pytest.param("CTRL_BREAK_EVENT", marks=mark)]
UP = [sys.executable, "-m", "petals_win.cli.main", "up"]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    assert len(processes) >= 5, "two nodes and three daemons"
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


def test_check_answers_paris():
    done = subprocess.run([*UP, "--check"], capture_output=True, encoding="utf-8", timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert re.search(r"[\d.]+ tokens/s", done.stdout)


def start(*arguments: str) -> subprocess.Popen[str]:
    # On Windows in a group of its own, since Ctrl+Break reaches whole groups.
    group = subprocess.CREATE_NEW_PROCESS_GROUP if sys.platform == "win32" else 0
    return subprocess.Popen(
        [*UP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", creationflags=group
    )


def end(up: subprocess.Popen[str], ending: str) -> None:
    if ending == "kill":
        up.kill()
    else:
        up.send_signal(getattr(signal, ending))


@contextlib.contextmanager
def answering() -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`petals-win up` when it answers: its process, its address, and all that it has printed."""
    port, lines = free_port(), list[str]()
    up = start("--port", str(port))
    try:
        for line in up.stdout or ():
            lines.append(line)
            if f"Chat page: http://127.0.0.1:{port}" in line:
                break
        else:
            raise AssertionError("it ended without an address: " + "".join(lines))
        yield up, f"http://127.0.0.1:{port}", lines
    finally:
        up.kill()
        up.communicate(timeout=60)


@contextlib.contextmanager
def busy_pc() -> Iterator[None]:
    """Programs that would like twice the cores of this PC, beside whatever else it does."""
    command = [sys.executable, "-I", "-S", "-c", "while True: pass"]
    programs = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait(30)


def assert_nothing_is_left(up: subprocess.Popen[str], ending: str) -> None:
    """On a busy PC, when it is ended so."""
    processes = descendants(up.pid)
    kinds = [] if sys.platform == "win32" else ["unix"]
    sockets = [c.laddr for p in processes for kind in kinds for c in p.net_connections(kind) if c.laddr]
    with busy_pc():
        end(up, ending)
        up.wait(60)
        assert_gone(processes, 60)
    if ending != "kill":
        assert up.returncode == 0
        assert not [path for path in sockets if os.path.exists(path)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_behind(ending):
    with answering() as (up, url, _lines):
        assert httpx.get(f"{url}/ready").json()["ready"] is True
        assert_nothing_is_left(up, ending)


def test_a_stop_during_the_start_ends_everything():
    up = start("--port", str(free_port()))
    deadline = time.monotonic() + 60
    while len(descendants(up.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = descendants(up.pid)
    end(up, "kill" if sys.platform == "win32" else "SIGTERM")
    assert up.wait(60) != 0
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert processes and not alive
    up.stdout.close()
