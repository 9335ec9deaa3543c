"""The main job under Windows Python with p2pd.exe: on any Windows PC, and from Linux by test_in_the_bench.py."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import psutil
import pytest

from petals_win.span.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="it takes Windows Python; scripts/windows-bench has one"
)

GONE_SECONDS = 5


def ours() -> dict[int, str]:
    """The Python and p2pd processes of this PC, and what they run."""
    found = {}
    for process in psutil.process_iter(["name"]):
        if (process.info["name"] or "").lower() in ("python.exe", "p2pd.exe"):
            found[process.pid] = process.info["name"]
    return found


def test_up_check_says_paris_and_leaves_nothing_behind():
    before = ours()
    began = time.monotonic()
    up = [sys.executable, "-m", "petals_win.cli.main", "up", "--check"]
    done = subprocess.run(up, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=280)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    speed = re.search(r"([\d.]+) tokens/s", done.stdout)
    assert speed is not None
    print(f"up --check: {seconds:.0f} s, {speed[1]} tokens/s")
    assert {pid: name for pid, name in ours().items() if pid not in before} == {}


def test_a_node_ended_by_force_takes_its_daemon_along():
    from greedy import TEXT, Client, text_by_transformers

    assert text_by_transformers() == TEXT
    with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30"]) as swarm:
        swarm.wait_until_serving()
        client = Client(swarm.peers)
        try:
            assert client.text() == TEXT
        finally:
            client.close()
        seconds = seconds_until_gone(swarm.nodes[1].child.pid)
        print(f"p2pd.exe was gone {seconds:.2f} s after TerminateProcess of its node")
        assert seconds < GONE_SECONDS


def seconds_until_gone(pid: int) -> float:
    """End a node by TerminateProcess; how long its daemon then runs."""
    node = psutil.Process(pid)
    daemons = [child for child in node.children(recursive=True) if child.name() == "p2pd.exe"]
    assert len(daemons) == 1
    node.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs(daemons, timeout=2 * GONE_SECONDS)
    assert not alive, "p2pd.exe outlives its node"
    return time.monotonic() - began
