"""scripts/workers in short: workers that are killed under eight clients, what transports cost, and when a bound is missed."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from petals_win.bench.kills import soak_kills
from petals_win.bench.steady import MODEL
from petals_win.bench.workers import SCHEMES, STREAMS, measure_overheads, overheads, percentile
from petals_win.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_workers", ROOT / "scripts" / "workers.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_three_kills_under_eight_clients(home, script):
    """Each question comes to a whole answer or, behind its first token, to one clear error."""
    before = psutil.Process().children()
    soaking = soak_kills(MODEL, home, 3, pairs=1, tokens=100, seconds=240, report=lambda _line: None)
    found = asyncio.run(soaking)
    assert found.kills == 3 and not found.wrong
    assert found.answers > 8 and found.broken > 0
    assert script.missed_by(script.figures_of(found)) == []
    assert psutil.Process().children() == before


def test_a_soak_has_an_end(home):
    soaking = soak_kills(MODEL, home, 1000, pairs=1, tokens=5, seconds=4, report=lambda _line: None)
    with pytest.raises(UserError, match="of 1000 kills took 4 s, which is all the time"):
        asyncio.run(soaking)


def test_each_token_is_timed_on_each_way(home):
    delays = asyncio.run(measure_overheads(home, 1, 5, lambda _line: None))
    settings = [str(streams) for streams in STREAMS] + ["16_together"]
    assert delays.keys() == {f"{side}_{setting}" for side in ("direct", *SCHEMES) for setting in settings}
    for name, values in delays.items():
        assert len(values) == 5 * (1 if name.endswith("_1") else 16) and min(values) >= 0
    added = overheads(delays)
    assert added.keys() == {f"{s}_{n}_{k}_ms" for s in SCHEMES for n in settings for k in ("median", "p99")}
    assert all(math.isfinite(value) for value in added.values())


def test_the_bounds(script):
    kept = {f"{s}_{n}_{k}_ms": 0.4 for s in SCHEMES for n in STREAMS for k in ("median", "p99")} | {"share": 0.6}
    assert script.missed(kept) == []
    assert script.missed({**kept, "share": 0.7, "zmq_16_p99_ms": 3.5}) == [
        "two workers took 0.700 of the time of one, and at most 0.65 is due",
        "zmq, 16 streams: p99 3.500 ms, and at most 3.0 ms is due",
    ]
    soaked = {"wrong": {}, "answers": 500, "refused": 5, "settled_mib": 100.0, "memory_mib": 112.0}
    assert script.missed_by(soaked) == []
    for worse in ({"wrong": {"hanging": 1}}, {"answers": 0, "refused": 0}, {"refused": 6}, {"memory_mib": 114.0}):
        assert len(script.missed_by({**soaked, **worse})) == 1


def test_a_percentile():
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0 and percentile(list(range(1000)), 0.99) == 990
