"""The garbage collector rests while much is imported."""

from __future__ import annotations

import gc
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
