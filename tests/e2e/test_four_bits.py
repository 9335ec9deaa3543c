"""The default model, whose file is of four bits, served in them by `petals-win up` without any option, until that is killed."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import httpx
from test_up import answering, assert_nothing_is_left

from petals_win.engines.base import Engine, GenerationRequest, Token
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.models.source import DEFAULT_MODEL

PROMPT = "The capital of France is the city of"
TOKENS = 32
SERVES = f"Serving in int4, since {DEFAULT_MODEL} is stored in four bits"


def by_up() -> tuple[str, str]:
    """The text after the prompt, and all that was printed."""
    with answering() as (up, url, lines):
        assert httpx.get(f"{url}/ready").json()["ready"] is True
        asked = {"model": DEFAULT_MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
        assert answer.status_code == 200, answer.text
        assert_nothing_is_left(up, "kill")
        return answer.json()["choices"][0]["text"], "".join(lines)


async def in_one_process() -> str:
    engine: Engine = await asyncio.to_thread(find_engine("local"), EngineSettings(DEFAULT_MODEL, quant="int4"))
    try:
        request = GenerationRequest(DEFAULT_MODEL, prompt=PROMPT, max_tokens=TOKENS, ignore_eos=True, temperature=0.0)
        async with aclosing(engine.generate(request)) as events:
            return "".join([event.text async for event in events if isinstance(event, Token)])
    finally:
        await engine.close()


def test_up_serves_it_so_and_a_forced_end_leaves_nothing_behind():
    text, said = by_up()
    assert said.count(SERVES) == 2, said
    assert "Paris" in text
    assert text == asyncio.run(in_one_process())
