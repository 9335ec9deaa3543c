"""Requests by chance: the short form of scripts/fuzz-api."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_whatever_is_asked_the_answer_is_documented():
    # In a process of its own: what schemathesis finds out before it asks takes seconds, which no other tests shall wait for.
    file = Path(__file__).with_name("fuzz_api.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "500", file]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=560)
    assert done.returncode == 0, done.stdout
