"""Several clients at once, and a busy program beside them: the short form of scripts/crowd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "crowd.py"


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_neither_more_clients_nor_a_busy_program_make_the_swarm_collapse():
    for _try in range(3):
        command = [sys.executable, SCRIPT, "--json", "--rounds", "1", "--tokens", "24"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr
        speed = json.loads(done.stdout)["medians"]["this"]
        if speed["8 idle"] >= 1.2 * speed["1 idle"] and speed["1 busy"] >= 0.6 * speed["1 idle"]:
            return
    pytest.fail(f"in none of three tries; the last gave, in tokens per second: {speed}")
