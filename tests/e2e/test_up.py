"""`petals-win up` as a user runs it: it answers, and whatever ends it, nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from conftest import free_port

UP = [sys.executable, "-m", "petals_win.cli.main", "up"]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    assert len(processes) >= 5, "two nodes and three daemons"
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


def test_check_answers_paris():
    done = subprocess.run([*UP, "--check"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert re.search(r"[\d.]+ tokens/s", done.stdout)


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_behind(ending):
    port = free_port()
    up = subprocess.Popen([*UP, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in up.stdout:
            if f"Chat page: http://127.0.0.1:{port}" in line:
                break
        else:
            raise AssertionError("it ended without an address")
        assert httpx.get(f"http://127.0.0.1:{port}/ready").json()["ready"] is True
        processes = descendants(up.pid)
        sockets = [c.laddr for p in processes for c in p.net_connections("unix") if c.laddr]
        up.send_signal(getattr(signal, ending))
        up.wait(20)
        assert_gone(processes, 20)
        if ending != "SIGKILL":
            assert up.returncode == 0
            assert not [path for path in sockets if os.path.exists(path)]
    finally:
        up.kill()
        up.stdout.close()


def test_a_stop_during_the_start_ends_everything():
    up = subprocess.Popen(
        [*UP, "--port", str(free_port())], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while len(descendants(up.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = descendants(up.pid)
    up.send_signal(signal.SIGTERM)
    assert up.wait(30) != 0
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert processes and not alive
    up.stdout.close()
