"""Nodes that are lost under eight answers: the short form of scripts/losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "losses.py"


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_answers_go_on_right_and_soon_wherever_nodes_are_lost():
    """One killed, one frozen, one cut off, and at last both frozen that hold the same blocks; with its limits of 6, 15 and 10 seconds."""
    command = [sys.executable, SCRIPT, "--json", "--losses", "3", "--altogether", "freeze"]
    for _try in range(2):  # a PC that is busy for a moment may be late once, but no text may ever be wrong
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=140)
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)
        kinds = found["kinds"].values()
        assert [(kind["losses"], kind["texts_wrong"], kind["errors"]) for kind in kinds] == [
            (1, 0, [])
        ] * 3, done.stderr
        assert all(kind["streams_hit"] for kind in kinds)
        assert [each["kind"] for each in found["altogether"]] == ["freeze"]
        if not found["wrong"]:
            return
    pytest.fail(f"{found['wrong']}\n{done.stderr}")
