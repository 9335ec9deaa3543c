"""A long prompt that a swarm has seen before: only its end is computed, and what is lost then is computed anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil
import pytest
import torch
from conftest import node_of

from petals_win.client.server_session import ServerSession
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


@pytest.fixture(autouse=True)
def sent(monkeypatch) -> list[int]:
    """How many tokens went to nodes, message by message."""
    seen, send = [], ServerSession.send

    def counting(session: ServerSession, hidden: torch.Tensor, *more, **settings) -> None:
        seen.append(hidden.shape[1])
        send(session, hidden, *more, **settings)

    monkeypatch.setattr(ServerSession, "send", counting)
    return seen


@dataclass
class Answer:
    tokens: list[int]
    cached: int


async def ask(engine: PetalsEngine, prompt: list[int], on_token: Callable[[Answer], None] = lambda _: None) -> Answer:
    request, answer, cached = GenerationRequest("", prompt=tuple(prompt), temperature=0.0), Answer([], 0), []
    async with contextlib.aclosing(engine.generate(prompt, request, 24, cached.append)) as tokens:
        async for token in tokens:
            if not answer.tokens:
                answer.cached = sum(cached)
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


def test_of_a_prompt_that_was_there_before_only_the_end_is_computed(swarm, prompt, sent):
    before_the_answer: list[int] = []

    def note(answer: Answer) -> None:
        if len(answer.tokens) == 1:
            before_the_answer.append(sum(sent))
            sent.clear()

    async def several(engine: PetalsEngine):
        found = []
        for _ in range(3):
            sent.clear()
            found.append(await ask(engine, prompt, note))
        return found, await ask(engine, [*prompt[:-40], *prompt])

    (first, *again), other_end = use(swarm, several)
    assert first.cached == 0 and [each.tokens for each in again] == [first.tokens] * 2
    most = (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert [each.cached for each in again] == [most] * 2
    assert other_end.cached == (len(prompt) - 40) // PAGE_TOKENS * PAGE_TOKENS
    rest = len(prompt) - most
    # Each of the two nodes gets all or the rest, and perhaps what follows the first token, which is read a moment later.
    assert before_the_answer[0] >= 2 * len(prompt)
    assert all(2 * rest <= count < 2 * (rest + 24 + 15) < len(prompt) for count in before_the_answer[1:])


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
