"""Many clients of an API, and what HTTP adds to an engine: the short forms of scripts/soak and scripts/overhead, on a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from api.fake_engine import MODEL, FakeEngine
from api.serving import serving

from petals_win.bench.http import measure
from petals_win.bench.soak import Soaked, soak
from petals_win.engines.base import Event, GenerationRequest, SwarmFailed

# Of HTTP for each token, processor time of the client included. It takes 0.2 to 0.4 ms; the PC may be busy, but a tick of
# Windows' clock is longer.
MOST_MS = 8.0


class Talkative(FakeEngine):
    """Each answer is as long as it may be; one of every `breaks` breaks."""

    def __init__(self, pace: float, breaks: int = 0):
        super().__init__(pace)
        self.breaks, self.asked = breaks, 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.asked += 1
        if self.breaks and self.asked % self.breaks == 0:
            raise SwarmFailed("It broke.")
        counted = GenerationRequest(model=request.model, prompt="count 5000", max_tokens=request.max_tokens)
        async for event in super().generate(counted):
            yield event


def soaked(engine: FakeEngine, **settings: int) -> Soaked:
    with serving(engine, **settings) as served:
        return asyncio.run(soak(served.url, MODEL, clients=8, seconds=1.5, tokens=20))


def test_each_of_many_clients_gets_a_whole_answer_or_a_clean_refusal():
    found = soaked(Talkative(0.01), max_running=2, max_waiting=2)
    assert found.answers >= 2 and found.tokens == 20 * found.answers
    assert found.refused >= 4
    assert not found.wrong


def test_an_answer_that_breaks_is_told():
    found = soaked(Talkative(0.002, breaks=3), max_running=8, max_waiting=0)
    assert found.answers and found.wrong == {"status 503": found.wrong["status 503"]}


def test_http_costs_little_for_each_token():
    (found,) = asyncio.run(asyncio.wait_for(measure(Talkative(0.0), "x", [(1500, 3)]), 120))
    by_http, by_python = (1000 / found.median(f"{side}_tokens_per_s") for side in ("http", "python"))
    assert by_http - by_python < MOST_MS
    assert min(found.values["http_first_s"]) < 0.3 * 1500 * by_http / 1000, "it does not wait for the rest"


def test_an_answer_of_another_length_is_no_measurement():
    with pytest.raises(RuntimeError, match="30 tokens was asked for, and 20"):
        asyncio.run(asyncio.wait_for(measure(_Short(0.0), "x", [(30, 1)]), 60))


class _Short(FakeEngine):
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async for event in super().generate(GenerationRequest(model=request.model, prompt="count 20")):
            yield event
