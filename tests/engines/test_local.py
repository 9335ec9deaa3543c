"""The engine "local": the same tokens as transformers, whatever the model, and little memory for many answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from contract import Whole, soon, started, whole
from tiny_chat import tiny_chat_model
from transformers import AutoModelForCausalLM

from petals_win.client.drafts import Pace
from petals_win.engines.base import EngineClosed, GenerationRequest, Token
from petals_win.engines.local import LocalEngine
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.engines.text import TextEngine
from petals_win.node import served
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.span.scheduler import Scheduler

CONTEXT = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=CONTEXT, ends=0)


def use(folder: Path, action: Callable[[TextEngine, LocalEngine], Awaitable], *, room: int | None = None):
    """Run a coroutine function on an engine that has memory for `room` tokens; afterwards none of it is taken."""

    async def within():
        engine = await asyncio.to_thread(find_engine("local"), EngineSettings(str(folder)))
        assert isinstance(engine, TextEngine) and isinstance(engine.tokens, LocalEngine)
        budget, span = engine.tokens._blocks._budget, engine.tokens._blocks._span
        if room is not None:
            budget.total_bytes = room * span.cache_bytes_per_token
        async with started(engine):
            result = await asyncio.wait_for(action(engine, engine.tokens), 100)
            assert await soon(lambda: budget.bytes_left == budget.total_bytes), "memory did not come back"
            return result

    return asyncio.run(within())


def chat(text: str = "Hello", **settings) -> GenerationRequest:
    messages = ({"role": "user", "content": text},)
    return GenerationRequest(**{"model": "tiny", "messages": messages, "temperature": 0, **settings})


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen3", {"head_dim": 18}), ("gpt2", {}), ("gpt_neox", {}), ("bloom", {}), ("gemma3_text", {})],
    ids=["llama", "odd heads", "learned positions", "no grouped heads", "alibi", "windows"],
)
def test_the_tokens_are_those_of_transformers(tmp_path, family, changes):
    folder = tiny_chat_model(tmp_path / "tiny", family, context=256, ends=0, **changes)
    prompts = [[1, 40 + n, *range(20, 24 + 5 * n)] for n in range(3)]
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = [
        reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]

    async def ask(_engine: TextEngine, tokens: LocalEngine):
        async def answer(prompt: list[int]) -> list[int]:
            return [token async for token in tokens.generate(prompt, chat(), 20)]

        return await asyncio.gather(*map(answer, prompts))

    assert use(folder, ask) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_text_that_repeats_itself_takes_fewer_steps(tmp_path, monkeypatch, family):
    """Drafts are made wherever they could help, whatever they cost here: the texts stay the same, drawn or not."""
    folder = tiny_chat_model(tmp_path / "tiny", family, context=256, ends=0)
    prompt = [1, *[40, 41, 42, 43, 44] * 6]
    requests = [chat(), chat(temperature=0.7, seed=3), chat(temperature=0, frequency_penalty=0.01)]
    steps: list[int] = []
    step = Scheduler.step
    monkeypatch.setattr(
        Scheduler,
        "step",
        lambda self, session, hidden, **how: steps.append(hidden.shape[1]) or step(self, session, hidden, **how),
    )

    async def ask(_engine: TextEngine, tokens: LocalEngine):
        return [[token async for token in tokens.generate(prompt, request, 100)] for request in requests]

    monkeypatch.setattr(Pace, "took", lambda *_: None)
    plain = use(folder, ask)
    assert steps == [len(prompt), *[1] * 99] * 3
    steps.clear()
    monkeypatch.setattr(Pace, "plain", 1.0)
    monkeypatch.setattr(Pace, "of", lambda *_: 1.0)
    assert use(folder, ask) == plain
    assert len(steps) < 270 and max(steps[1:100]) > 1


def test_answers_that_grow_beyond_what_there_is_are_all_given(folder, monkeypatch):
    """Two are let in, and both come to want more than is left. Who starts over goes on with the same text."""
    monkeypatch.setattr(served, "PIECE_TOKENS", 32)
    opened: list[int] = []

    async def ask(engine: TextEngine, tokens: LocalEngine):
        open_session = tokens._blocks.open
        monkeypatch.setattr(
            tokens._blocks, "open", lambda length, known: opened.append(length) or open_session(length, known)
        )
        settings = [dict(temperature=0), dict(temperature=1.0, seed=5, min_tokens=100, repetition_penalty=1.1)]
        asked = [chat(f"Number {n}", max_tokens=130, **settings[n]) for n in range(2)]
        at_once = await asyncio.gather(*(whole(engine, each) for each in asked))
        assert len(opened) > 2, "nobody had to start over, so the test shows nothing"
        return at_once, [await whole(engine, each) for each in asked]

    at_once, alone = use(folder, ask, room=170)
    assert at_once == alone
    assert [answer.usage.completion_tokens for answer in at_once] == [130] * 2


def test_what_there_is_memory_for_is_the_context_that_is_offered(folder):
    async def ask(engine: TextEngine, _tokens: LocalEngine) -> tuple[int, Whole]:
        return engine.models()[0].context_length, await whole(engine, chat("x" * 250))

    context, answer = use(folder, ask, room=300)
    assert context == 300 and answer.reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 300


def test_how_much_of_the_memory_is_in_use_is_told(folder):
    async def ask(engine: TextEngine, _tokens: LocalEngine):
        before = engine.status().cache_usage
        answer = engine.generate(chat("x" * 250))
        await anext(answer)
        during = engine.status().cache_usage
        await answer.aclose()
        return before, during, engine.status()

    before, during, after = use(folder, ask, room=1000)
    assert before == after.cache_usage == 0 and during is not None and 0.2 < during <= 1
    assert after.num_blocks > 0 and not after.missing_blocks


def test_closing_ends_those_that_wait_in_the_line(folder):
    async def ask(engine: TextEngine, tokens: LocalEngine):
        budget = tokens._blocks._budget
        long = engine.generate(chat("x" * 3000))
        assert isinstance(await anext(long), Token)
        budget.total_bytes = budget.total_bytes - budget.bytes_left + 1
        waiting = asyncio.create_task(whole(engine, chat("y" * 100)))
        assert await soon(lambda: len(budget._line) == 1)
        began = time.monotonic()
        await engine.close()
        with pytest.raises(EngineClosed):
            await waiting
        with pytest.raises(EngineClosed):
            async for _ in long:
                pass
        assert time.monotonic() - began < 20

    use(folder, ask, room=5000)


def test_a_prompt_that_was_there_before_is_not_computed_again(folder, monkeypatch):
    """The same text, also where only the beginning is the same; at least the last token is computed."""
    prompt = [1, *(20 + n % 40 for n in range(199))]

    async def ask(engine: TextEngine, tokens: LocalEngine):
        async def answer(ids: list[int]) -> Whole:
            return await whole(engine, GenerationRequest("tiny", prompt=tuple(ids), max_tokens=70, temperature=0))

        first = await answer(prompt)
        said = [token async for token in tokens.generate(prompt, chat(), 70)]
        asked = (prompt, [*prompt[:150], *prompt], prompt[:128], [*prompt, *said, 33], prompt[:64], prompt[1:])
        again = [await answer(each) for each in asked]
        tokens._blocks._prefixes.shrink(0)
        anew = [await answer(each) for each in reversed(asked)][::-1]
        return first, again, anew

    first, again, anew = use(folder, ask)
    assert first.usage.cached_tokens == 0 and again[0].text == first.text
    assert [each.usage.cached_tokens for each in again] == [192, 128, 64, 256, 0, 0]
    assert [each.text for each in again] == [each.text for each in anew]


def test_what_is_kept_gives_way_to_answers(folder):
    """Never more than there is, and a chat is admitted as if nothing were kept."""

    async def ask(engine: TextEngine, tokens: LocalEngine):
        blocks = tokens._blocks
        for number in range(12):
            prompt = (4 + number, *(20 + n % 40 for n in range(149)))
            await whole(engine, GenerationRequest("tiny", prompt=prompt, max_tokens=8, temperature=0))
            held = blocks._budget.total_bytes - blocks._budget.bytes_left
            assert held + blocks._prefixes.nbytes <= blocks._budget.total_bytes
        kept = blocks._prefixes.nbytes
        answers = await asyncio.gather(*(whole(engine, chat(f"{n}", max_tokens=300)) for n in range(6)))
        assert [each.usage.completion_tokens for each in answers] == [300] * 6
        return kept, blocks._prefixes.nbytes, blocks._span.cache_bytes_per_token

    kept, _, token_bytes = use(folder, ask, room=1500)
    assert kept == 11 * 2 * PAGE_TOKENS * token_bytes, "of each prompt its whole pages, and nothing else"


def test_nothing_is_kept_of_what_deep_prompts_played_a_part_in(folder):
    async def ask(_engine: TextEngine, tokens: LocalEngine):
        blocks, prompt = tokens._blocks, list(range(1, 91))
        size = blocks._span.row.width
        chance = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, len(prompt), size, generator=chance)
        deep = torch.randn(blocks._span.end, 1, 3, size, generator=chance)

        async def asked(prompts: torch.Tensor | None) -> int:
            session = blocks.open(100, prompt)
            outputs = await session.step(hidden, prompts=prompts)
            assert outputs.shape[1] == len(prompt) - session.cached_tokens
            await session.close(prompt)
            return session.cached_tokens

        assert await asked(deep) == 0 and blocks._prefixes.nbytes == 0
        assert await asked(None) == 0 and blocks._prefixes.nbytes > 0
        assert await asked(deep) == 0, "nor do they find anything"
        assert await asked(None) == PAGE_TOKENS

    use(folder, ask)


def test_a_session_takes_tokens_back(folder):
    async def ask(_engine: TextEngine, tokens: LocalEngine):
        hidden = torch.randn(1, 9, tokens._blocks._span.row.width, generator=torch.Generator().manual_seed(0))
        whole, session = tokens._blocks.open(20), tokens._blocks.open(20)
        expected = await whole.step(hidden)
        await session.step(torch.cat([hidden[:, :4], -hidden[:, 4:]], dim=1))
        session.truncate(4)
        assert session.position == 4
        torch.testing.assert_close(await session.step(hidden[:, 4:]), expected[:, 4:], atol=1e-5, rtol=1e-4)
        for wrong in (0, 10):
            with pytest.raises(ValueError, match="cannot be kept"):
                session.truncate(wrong)
        await whole.close()
        await session.close()

    use(folder, ask)
