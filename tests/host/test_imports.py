"""The garbage collector rests while much is imported."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from petals_win.host.imports import importing


@pytest.fixture(autouse=True)
def collector_as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_collected_meanwhile_nor_looked_at_afterwards():
    before = collections()
    with importing():
        made = [[number] for number in range(100_000)]
        assert collections() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    assert not any(found is made for found in gc.get_objects())


def test_at_the_end_all_is_let_go():
    """Else libraries complain of leaks on standard error, as the last words of a program that failed."""
    code = """
from petals_win.host.imports import importing
class Held:
    def __del__(self): print("let go")
with importing():
    held = Held()
    held.itself = held
del held
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "let go\n"


def test_a_failed_import_leaves_the_collector_on():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_whoever_turned_the_collector_off_keeps_it_off():
    gc.disable()
    frozen = gc.get_freeze_count()
    with importing(), importing():
        pass
    assert not gc.isenabled()
    assert gc.get_freeze_count() == frozen
