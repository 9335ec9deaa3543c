"""What a swarm of two nodes costs under Windows Python. By itself, since everything else on the PC would be measured, too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="it takes Windows Python; scripts/windows-bench has one"
)


def test_a_swarm_keeps_up_with_one_process():
    command = [sys.executable, "-m", "petals_win.cli.main", "bench", "--tokens", "16", "--rounds", "5", "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(done.stdout)
    print(
        f"two nodes {measured['swarm_tokens_per_s']:.1f} tokens/s, one process {measured['local_tokens_per_s']:.1f}: "
        f"ratio {measured['ratio']:.2f}"
    )
    assert measured["ratio"] > 0.7, "0.92 on an idle PC"
