"""Locks between processes, and who holds them."""

import subprocess
import sys
import textwrap
import time

import pytest

from petals_win.errors import UserError
from petals_win.host.locks import hold_lock

HOLDER = """
    import sys, time
    from pathlib import Path
    from petals_win.host.locks import hold_lock
    with hold_lock(Path(sys.argv[1]), "the other test"):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    path = tmp_path / "a.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with process:
        yield process, path
        process.kill()


def test_the_holder_is_named(holder):
    process, path = holder
    with pytest.raises(UserError) as refused, hold_lock(path, "this test"):
        pass
    assert "the other test" in str(refused.value) and str(process.pid) in str(refused.value)


def test_waiting_ends_when_the_holder_does(holder):
    process, path = holder
    process.stdin.close()
    with hold_lock(path, "this test", timeout=30):
        pass


def test_a_killed_holder_leaves_nothing_to_wait_for(holder):
    process, path = holder
    process.kill()
    process.wait(30)
    with hold_lock(path, "this test", timeout=30):
        pass


def test_the_deadline_is_kept(holder):
    _, path = holder
    began = time.monotonic()
    with pytest.raises(UserError), hold_lock(path, "this test", timeout=0.3):
        pass
    assert 0.25 < time.monotonic() - began < 20


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ValueError), hold_lock(tmp_path / "b.lock", "this test"):
        raise ValueError
    with hold_lock(tmp_path / "b.lock", "this test"):
        pass


def test_the_holder_s_name_is_being_read_when_the_lock_is_given_back(tmp_path):
    path = tmp_path / "it.lock"
    with hold_lock(path, "the first"):
        reader = (tmp_path / "it.lock.holder").open()
    with hold_lock(path, "the second"):
        reader.close()
