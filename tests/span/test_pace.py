"""Steps that take five times as long as at load are told of, once, and only where they are slow all the time."""

from __future__ import annotations

import logging

import pytest

from petals_win.host import gpu
from petals_win.node.budget import CacheBudget
from petals_win.node.service import BlockService
from petals_win.span.pace import Pace
from petals_win.span.span import Span


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "petals_win")
    return lambda: [record.getMessage() for record in caplog.records if record.name.endswith("pace")]


def test_it_is_told_once(warnings):
    pace = Pace(0.010)
    for _ in range(7):
        pace.took(0.060, [100])
    assert warnings() == []
    for _ in range(20):
        pace.took(0.060, [100])
    (said,) = warnings()
    assert said.startswith("Steps take 6 times as long as when the blocks were loaded: 60 ms, not 10.")


@pytest.mark.parametrize(
    ("seconds", "positions"),
    [(0.049, [100]), (0.199, [100, 5, 9, 7]), (0.500, [100, 9000]), (0.500, [])],
    ids=["slower", "four sessions", "a long text", "all gone"],
)
def test_what_is_as_it_should_be(warnings, seconds, positions):
    pace = Pace(0.010)
    for _ in range(30):
        pace.took(seconds, positions)
    assert warnings() == []


def test_a_slow_step_now_and_then(warnings):
    pace = Pace(0.010)
    for turn in range(50):
        pace.took(0.010 if turn % 8 == 0 else 0.100, [100])
    assert warnings() == []


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_the_setting_is_named_where_there_is_one(warnings, monkeypatch, platform):
    monkeypatch.setattr(gpu.sys, "platform", platform)
    pace = Pace(0.010)
    for _ in range(8):
        pace.took(0.060, [100])
    (said,) = warnings()
    assert ("CUDA - Sysmem Fallback Policy" in said) == (platform == "win32")


def test_a_node_tells_it_what_its_steps_take(checkpoint, compute, warnings):
    import asyncio

    import torch

    from petals_win.models.source import open_model

    span = Span.load(open_model(str(checkpoint("llama"))), 1, 4)
    service = BlockService(
        span, compute, CacheBudget(8 * 2**20), context_length=512, request_tokens=64, pace=Pace(1e-9)
    )

    async def ask() -> None:
        session = service.open(1, 4, batch_size=1, max_length=100)
        await session.step(torch.zeros(1, 20, 64))  # a prompt counts for nothing
        for _ in range(7):
            await session.step(torch.zeros(1, 1, 64))
        assert warnings() == []
        await session.step(torch.zeros(1, 1, 64))
        await session.close()

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert len(warnings()) == 1
