"""A question to real nodes: of its prompt the last node sends one token's outputs, and the answer is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kept_prompts import ask, use
from test_kept_prompts import prompt as prompt  # a fixture

from petals_win.client import decode, server_session
from petals_win.engines.petals import PetalsEngine
from petals_win.swarm.local import LocalSwarm

HIDDEN_BYTES = 576 * 4  # of a token of SmolLM2 in 32 bits


@pytest.fixture
def came(monkeypatch) -> list[int]:
    """The bytes of each answer of a node."""
    sizes, read = [], server_session.read_answer

    def counting(response: Any, *more: Any) -> torch.Tensor:
        sizes.append(response.ByteSize())
        return read(response, *more)

    monkeypatch.setattr(server_session, "read_answer", counting)
    return sizes


def test_a_prompt_comes_back_once_rather_than_twice(swarm: LocalSwarm, prompt, came, monkeypatch):
    """From the first node all of it, in case that the second one is lost; each client is new to the nodes."""

    async def once(engine: PetalsEngine):
        before_the_answer: list[int] = []
        came.clear()
        answer = await ask(engine, prompt, lambda _: before_the_answer.append(sum(came)))
        return answer.tokens, before_the_answer[0]

    tokens, few = use(swarm, once)
    monkeypatch.setattr(decode._Row, "outputs_of_blocks", _all_and_cut)
    same_tokens, many = use(swarm, once)
    assert same_tokens == tokens
    whole = len(prompt) * HIDDEN_BYTES
    assert len(prompt) > 256, "several chunks"
    assert many > 2 * whole and many - few == pytest.approx(
        whole - HIDDEN_BYTES, rel=0.02
    )  # the next step may have set out


async def _all_and_cut(row: Any) -> torch.Tensor:
    return (await row.answer.session.step(row.hidden))[:, -1 - row.answer.drafted :]
