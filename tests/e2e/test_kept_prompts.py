"""A long prompt that a swarm has seen before: only its end is computed, and what is lost then is computed anew."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil
import pytest
from conftest import node_of

from petals_win.engines.base import GenerationRequest
from petals_win.engines.petals import PetalsEngine
from petals_win.models.source import DEFAULT_MODEL, open_model
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.swarm.local import LocalSwarm

STORY = "The dragon went to the baker and asked for bread. The baker had only {} loaves left, and said so. "


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    text = "".join(STORY.format(number) for number in range(20))
    return open_model(DEFAULT_MODEL).tokenizer()(text)["input_ids"]


@dataclass
class Answer:
    tokens: list[int]
    cached: int
    first_token_s: float


async def ask(engine: PetalsEngine, prompt: list[int], on_token: Callable[[Answer], None] = lambda _: None) -> Answer:
    request, began = GenerationRequest("", prompt=tuple(prompt), temperature=0.0), time.monotonic()
    answer, cached = Answer([], 0, 0.0), []
    async with contextlib.aclosing(engine.generate(prompt, request, 24, cached.append)) as tokens:
        async for token in tokens:
            if not answer.tokens:
                answer.cached, answer.first_token_s = sum(cached), time.monotonic() - began
            answer.tokens.append(token)
            on_token(answer)
    return answer


def use(swarm: LocalSwarm, action: Callable[[PetalsEngine], Awaitable]):
    async def within():
        engine = await asyncio.to_thread(PetalsEngine.connect, DEFAULT_MODEL, swarm.peers)
        try:
            await engine.start(lambda why: pytest.fail(str(why)))
            return await asyncio.wait_for(action(engine), 120)
        finally:
            await engine.close()

    return asyncio.run(within())


def test_a_prompt_that_was_there_before_is_answered_sooner(swarm, prompt):
    async def several(engine: PetalsEngine):
        return [await ask(engine, prompt) for _ in range(3)], await ask(engine, [*prompt[:-40], *prompt])

    (first, *again), other_end = use(swarm, several)
    assert first.cached == 0 and [each.tokens for each in again] == [first.tokens] * 2
    most = (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert [each.cached for each in again] == [most] * 2
    assert other_end.cached == (len(prompt) - 40) // PAGE_TOKENS * PAGE_TOKENS
    assert 2 * min(each.first_token_s for each in again) < first.first_token_s


def test_a_node_that_dies_after_a_hit(prompt):
    killed: list[object] = []

    async def several(engine: PetalsEngine):
        def kill_the_last_node(answer: Answer) -> None:
            if answer.cached and len(answer.tokens) == 8:
                ((*_, (peer_id, start, end)),) = engine.routes()
                assert (start, end) == (15, 30)
                killed.append(peer_id)
                psutil.Process(node_of(swarm, peer_id).child.pid).kill()

        undisturbed = await ask(engine, prompt)
        # Each holder of the second half has it after two times at the most.
        for _ in range(3):
            answer = await ask(engine, prompt, kill_the_last_node)
            assert answer.tokens == undisturbed.tokens
            if killed:
                break
        after = await ask(engine, prompt)
        assert after.tokens == undisturbed.tokens

    with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30", "15:30"]) as swarm:
        swarm.wait_until_serving()
        use(swarm, several)
    assert len(killed) == 1
