"""What a swarm of two nodes costs under Windows Python. By itself, since everything else on the PC would be measured, too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="it takes Windows Python; scripts/windows-bench has one"
)


# Measured by Wine: 0.86 and 1.01 on AMD's processors, 0.63 on one of Intel's, where plain layers, and so one process, are faster.
ENOUGH = 0.5
TRIES = 3  # whatever else the PC does takes from both, but not evenly


@pytest.mark.timeout(TRIES * 420)
def test_a_swarm_keeps_up_with_one_process():
    command = [sys.executable, "-m", "petals_win.cli.main", "bench", "--tokens", "16", "--rounds", "5", "--json"]
    command += ["--sessions", "1", "--prompt", "0"]
    ratios = []
    while len(ratios) < TRIES and max(ratios, default=0) < ENOUGH:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        measured = json.loads(done.stdout)
        swarm, local = measured["swarm_tokens_per_s"], measured["local_tokens_per_s"]
        print(f"two nodes {swarm:.1f} tokens/s, one process {local:.1f}: ratio {measured['ratio']:.2f}")
        ratios.append(measured["ratio"])
    assert max(ratios) >= ENOUGH
