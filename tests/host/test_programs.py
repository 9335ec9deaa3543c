"""Programs of others as children: their end."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from petals_win.host.programs import Program


@pytest.mark.parametrize("_number", range(5))
def test_one_that_is_ended_right_after_its_start_does_not_run_on(tmp_path: Path, _number: int):
    ended = threading.Event()
    program = Program(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        folder=tmp_path,
        env=os.environ,
        on_output=lambda _: None,
        on_error=lambda _: None,
        on_end=lambda _: ended.set(),
    )
    began = time.monotonic()
    program.kill()
    assert ended.wait(60) and time.monotonic() - began < 60
