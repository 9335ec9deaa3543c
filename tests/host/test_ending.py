"""Ending this process, whatever its threads and modules would still like to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

BUSY = """
import sys, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
sys.stdout.write("a last word without an end of line")
"""
NOW = "from petals_win.host.ending import end_now; end_now(3)"
COMMAND = "from petals_win.cli.main import main; sys.argv = ['petals-win', *{!r}]; main()"


@pytest.mark.parametrize(
    ("program", "status"), [(NOW, 3), (COMMAND.format(["--version"]), 0), (COMMAND.format(["no such command"]), 2)]
)
def test_threads_that_still_work_are_not_waited_for(program, status):
    done = subprocess.run([sys.executable, "-c", BUSY + program], capture_output=True, encoding="utf-8", timeout=45)
    assert done.returncode == status
    assert done.stdout.startswith("a last word")


def test_nobody_has_to_read_the_last_word():
    program = subprocess.Popen(
        [sys.executable, "-E", "-c", f"import time; print(1); time.sleep(1); {NOW}"], stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    program.stdout.close()
    assert program.wait(45) == 3
