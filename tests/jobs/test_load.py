"""How busy and how fast workers are: what is measured beside others is put down to an answer alone, and like ones get alike."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from petals_win.jobs import load as load_room
from petals_win.jobs.known_worker import KnownWorker, Speeds
from petals_win.jobs.links import parse_address
from petals_win.jobs.load import Load
from petals_win.jobs.model import WorkerState


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(load_room.time, "monotonic", lambda: now.seconds)
    return now


def test_speed_is_put_down_to_an_answer_alone(clock):
    """By how many ran in the mean, also for the last one to end, which is alone by then."""

    async def run():
        load = Load(8)
        async with AsyncExitStack() as all_of_them:
            places = [AsyncExitStack() for _ in range(4)]
            timed = [await stack.enter_async_context(load.place()) for stack in places]
            for stack in places:
                all_of_them.push_async_exit(stack)
            clock.seconds += 2
            for each in timed:
                each.came()
            clock.seconds += 10
            found = []
            for stack, each in zip(places, timed, strict=True):
                load.tokens_per_s = load.prompt_tokens_per_s = None
                each.complete(100, 21)
                await stack.aclose()
                found.append((load.tokens_per_s, load.prompt_tokens_per_s))
        return found

    assert asyncio.run(run()) == [(pytest.approx(2 * 2.0), pytest.approx(50 * 2.0))] * 4


def shared_out(*speeds: float | None, questions: int = 8) -> list[int]:
    """How many of so many questions at once each worker gets."""

    async def connect(_address):
        raise AssertionError("nobody connects")

    workers = [KnownWorker(parse_address(f"grpc://10.0.0.{number}:31400"), connect) for number in range(len(speeds))]
    for worker, speed in zip(workers, speeds, strict=True):
        worker.state = WorkerState(
            "w", (), True, "", slots=16, tokens_per_s=speed, prompt_tokens_per_s=speed and 8 * speed
        )
    for _ in range(questions):
        usual = Speeds.usual(workers)
        min(workers, key=lambda worker: worker.seconds(200, 32, usual)).running += 1
    return [worker.running for worker in workers]


def test_like_workers_share_evenly_and_a_much_faster_one_gets_more():
    assert shared_out(20.0, 30.0) == shared_out(None, None) == shared_out(25.0, None) == [4, 4]
    slow, fast = shared_out(10.0, 60.0)
    assert fast > 3 * slow
