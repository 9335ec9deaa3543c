"""Whether Windows is asked to stay awake, and told when that is no longer needed."""

import ctypes
import sys
from types import SimpleNamespace

import pytest

from petals_win.host.awake import stay_awake


@pytest.fixture
def asked(monkeypatch):
    """A fake of Windows' function, which cannot be asked what it was told; returns what it answers and was told."""
    calls = SimpleNamespace(answer=0x80000000, states=[])

    def set_state(state):
        calls.states.append(state.value)
        return calls.answer

    kernel32 = SimpleNamespace(SetThreadExecutionState=set_state)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    return calls


def test_windows_stays_awake_for_the_length_of_the_block(asked):
    with pytest.raises(ZeroDivisionError), stay_awake():
        assert asked.states == [0x80000001]
        raise ZeroDivisionError
    assert asked.states == [0x80000001, 0x80000000]


def test_a_refusal_is_said_and_changes_nothing(asked, caplog):
    asked.answer = 0
    with stay_awake():
        pass
    assert asked.states == [0x80000001]
    assert "may fall asleep" in caplog.text


@pytest.mark.skipif(sys.platform != "win32", reason="SetThreadExecutionState is Windows'")
def test_windows_itself_accepts_it(caplog):
    with stay_awake():
        # The state of before is what the next call returns.
        assert (
            ctypes.windll.kernel32.SetThreadExecutionState(ctypes.c_uint(0x80000001)) == ctypes.c_int(0x80000001).value
        )
    assert caplog.text == ""


def test_elsewhere_nothing_happens(monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "linux")
    with stay_awake():
        pass
    assert caplog.text == ""
