"""The engine "petals" in front of a real swarm: two nodes of the default model on loopback."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest

from petals_win.engines.base import (
    Constraint,
    ContextTooLong,
    Finished,
    GenerationRequest,
    ModelNotFound,
    SwarmUnavailable,
    Token,
    ToolCallBegun,
    Usage,
)
from petals_win.engines.petals import PetalsEngine
from petals_win.engines.text import TextEngine
from petals_win.errors import UserError
from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

QUESTION = ({"role": "user", "content": "What is the capital of France?"},)
STORY = ({"role": "user", "content": "Tell me a long story about a dragon and a baker."},)


@pytest.fixture
def use(swarm: LocalSwarm):
    """Runs a coroutine function on an engine that follows the swarm, and closes the engine."""

    def run(action: Callable[[TextEngine], Awaitable]):
        async def within():
            engine = TextEngine(await asyncio.to_thread(PetalsEngine.connect, DEFAULT_MODEL, swarm.peers))
            try:
                await engine.start(on_lost)
                return await asyncio.wait_for(action(engine), 120)
            finally:
                await engine.close()

        return asyncio.run(within())

    return run


def on_lost(why: UserError) -> None:
    raise AssertionError(f"the engine was lost: {why}")


def request(messages=QUESTION, **settings) -> GenerationRequest:
    if "prompt" in settings:
        messages = None
    return GenerationRequest(**{"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, **settings})


async def answer(engine: TextEngine, asked: GenerationRequest) -> tuple[str, str, Usage]:
    """Text, reason of the end, usage; and the events are in the order of the protocol."""
    events = [event async for event in engine.generate(asked)]
    *tokens, finished, usage = events
    assert all(isinstance(token, Token) and token.text for token in tokens)
    assert isinstance(finished, Finished) and isinstance(usage, Usage)
    return "".join(token.text for token in tokens), finished.reason, usage


def test_an_answer(use):
    text, reason, usage = use(lambda engine: answer(engine, request(max_tokens=32)))
    assert text == "The capital of France is Paris."
    assert reason == "stop"
    assert 7 <= usage.completion_tokens <= 9 and usage.prompt_tokens > 10


def test_lengths_and_stop_strings(use):
    async def ask(engine):
        cut = await answer(engine, request(max_tokens=3))
        stopped = await answer(engine, request(stop=("France", "nowhere")))
        over_tokens = await answer(engine, request(stop=("is Par",)))
        continued = await answer(engine, request(prompt="1, 2, 3, 4, 5, 6,", max_tokens=6))
        ids = engine.tokens.language.tokenizer("1, 2, 3, 4, 5, 6,")["input_ids"]
        by_ids = await answer(engine, request(prompt=tuple(ids), max_tokens=6))
        return cut, stopped, over_tokens, continued, by_ids

    cut, stopped, over_tokens, continued, by_ids = use(ask)
    assert cut[0] == "The capital of" and cut[1] == "length" and cut[2].completion_tokens == 3
    assert stopped[:2] == ("The capital of ", "stop")
    assert over_tokens[:2] == ("The capital of France ", "stop")
    assert continued[0].replace(" ", "").startswith("7,8,") and continued[1] == "length"
    assert by_ids == continued


def test_an_answer_that_is_held_to_a_schema(use):
    properties = {
        "capital": {"type": "string"},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
    }
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    function = {"name": "look_up", "parameters": schema}

    async def ask(engine):
        held = request(constraint=Constraint("json_schema", json.dumps(schema)), max_tokens=100)
        forced = request(tools=({"type": "function", "function": function},), tool_choice="required", max_tokens=100)
        return await answer(engine, held), [event async for event in engine.generate(forced)]

    (text, reason, _), (begun, *arguments, finished, _usage) = use(ask)
    assert reason == "stop" and json.loads(text)["capital"] == "Paris"
    assert isinstance(begun, ToolCallBegun) and begun.name == "look_up" and finished == Finished("tool_calls")
    assert json.loads("".join(piece.text for piece in arguments)).keys() == properties.keys()


def test_the_assistants_turn_is_continued(use):
    """As the reader sees it: what was begun and what comes after it are one text, however the beginning ends."""

    async def ask(engine):
        beginnings = ("The capital of France is", "The capital of France is ", "The capital of")
        asked = [(*QUESTION, {"role": "assistant", "content": beginning}) for beginning in beginnings]
        whole = await answer(engine, request(max_tokens=32))
        parts = [await answer(engine, request(each, max_tokens=32, continue_final=True)) for each in asked]
        # Not the tokens of another turn.
        bare = await answer(engine, request(QUESTION, max_tokens=1))
        return beginnings, whole, parts, bare

    beginnings, whole, parts, bare = use(ask)
    assert parts[0][0] == " Paris."
    for beginning, (text, reason, usage) in zip(beginnings, parts, strict=True):
        assert (beginning + text, reason) == (whole[0], "stop")
        assert bare[2].prompt_tokens < usage.prompt_tokens < bare[2].prompt_tokens + 8
        assert usage.completion_tokens < whole[2].completion_tokens


def test_tiny_numbers_penalties_and_biases(use):
    async def ask(engine):
        ids = engine.tokens.language.tokenizer(" Paris", add_special_tokens=False)["input_ids"]
        whole = await answer(engine, request(max_tokens=12))
        tiny = await answer(engine, request(max_tokens=12, temperature=1e-38, seed=1))
        biased = await answer(engine, request(max_tokens=12, logit_bias={ids[0]: -100}))
        shorter = await answer(engine, request(STORY, max_tokens=8, frequency_penalty=2, presence_penalty=2))
        longer = await answer(engine, request(max_tokens=16, ignore_eos=True))
        with pytest.raises(UserError, match="logit_bias: the model has the tokens 0 to"):
            await answer(engine, request(logit_bias={10**6: 1}))
        return whole, tiny, biased, shorter, longer

    whole, tiny, biased, shorter, longer = use(ask)
    assert tiny == whole
    assert "Paris" not in biased[0]
    assert shorter[0]
    assert longer[1] == "length" and longer[2].completion_tokens == 16


def test_a_seed_repeats_an_answer(use):
    async def ask(engine):
        sampled = dict(temperature=1.5, top_p=0.95, max_tokens=12)
        first, again, other = [(await answer(engine, request(STORY, **sampled, seed=seed)))[0] for seed in (7, 7, 8)]
        # The seed is the request's own: another request at the same time does not disturb it.
        both = await asyncio.gather(
            answer(engine, request(STORY, **sampled, seed=7)), answer(engine, request(STORY, **sampled, seed=9))
        )
        return first, again, other, both[0][0]

    first, again, other, beside_another = use(ask)
    assert first == again == beside_another
    assert first != other


def test_several_at_once(use):
    words = ("red", "green", "blue", "white")

    async def ask(engine):
        asked = [request(prompt=f"The {word} flag of the old town", max_tokens=10) for word in words]
        one_by_one = [await answer(engine, each) for each in asked]
        return one_by_one, await asyncio.gather(*(answer(engine, each) for each in asked))

    one_by_one, at_once = use(ask)
    assert at_once == one_by_one


def test_four_chats_without_a_limit_and_then_a_fifth(use):
    async def ask(engine):
        chats = [engine.generate(request(STORY)) for _ in range(4)]
        firsts = await asyncio.gather(*(anext(generation) for generation in chats))
        assert all(isinstance(first, Token) for first in firsts)
        fifth = await answer(engine, request(max_tokens=32))
        for generation in chats:
            await generation.aclose()
        return fifth[0]

    assert use(ask) == "The capital of France is Paris."


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_whoever_stops_reading_ends_the_computation(use, how):
    async def ask(engine):
        async def read(generation, count: int) -> int:
            async for event in generation:
                count -= isinstance(event, Token)
                if count == 0:
                    break
            return count

        steps: list[None] = []
        tasks = asyncio.all_tasks()
        engine.tokens._model.register_forward_hook(lambda *_: steps.append(None))
        generation = engine.generate(request(STORY, max_tokens=1000))
        assert await read(generation, 3) == 0
        before = len(steps)
        if how == "aclose":
            await generation.aclose()
        else:
            # A token that has come meanwhile is read: one that is still being computed is cancelled.
            while True:
                task = asyncio.ensure_future(anext(generation))
                done, _ = await asyncio.wait([task], timeout=0.002)
                if not done:
                    break
                before = len(steps)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        more = len(steps) - before
        # Nothing of it is left: no task waits, and the next answer comes as if it had never been.
        assert not engine.tokens._running
        assert asyncio.all_tasks() <= tasks
        text, *_ = await answer(engine, request(max_tokens=32))
        return more, text

    more, text = use(ask)
    assert more <= 2, "the token in work, and one that began while it was cancelled"
    assert text == "The capital of France is Paris."


def test_requests_that_cannot_be_answered(use):
    async def refusal(engine, asked) -> UserError:
        with pytest.raises(UserError) as refused:
            await answer(engine, asked)
        return refused.value

    async def ask(engine):
        context, unknown = engine.models()[0].context_length, 49152
        too_long = await refusal(engine, request(prompt=(5,) * (context + 1)))
        assert isinstance(too_long, ContextTooLong)
        assert f"The prompt has {context + 1} tokens" in str(too_long) and str(context) in str(too_long)
        assert isinstance(
            await refusal(engine, request(prompt=(5,) * context)), ContextTooLong
        ), "no room for an answer"
        assert "prompt is empty" in str(await refusal(engine, request(prompt="")))
        assert "prompt is empty" in str(await refusal(engine, request(prompt=())))
        for token in (unknown, -1):
            assert f"tokens 0 to {unknown - 1}, but the prompt has {token}" in str(
                await refusal(engine, request(prompt=(1, token)))
            )
        assert isinstance(await refusal(engine, request(model="gpt-5")), ModelNotFound)
        assert engine.tokens._running == set()

    use(ask)


def test_models_and_status(use):
    async def ask(engine):
        return engine.models(), engine.status()

    (card,), status = use(ask)
    assert card.id == DEFAULT_MODEL and card.context_length == 8192
    assert abs(card.created - time.time()) < 600
    assert status.ready and status.missing_blocks == ()
    assert sorted((peer.start_block, peer.end_block) for peer in status.peers) == [(0, 15), (15, 30)]


def test_close_ends_what_is_running(swarm):
    async def run():
        engine = TextEngine(await asyncio.to_thread(PetalsEngine.connect, DEFAULT_MODEL, swarm.peers))
        await engine.start(on_lost)
        generation = engine.generate(request(STORY, max_tokens=1000))
        await anext(generation)
        await asyncio.wait_for(engine.close(), 30)
        await generation.aclose()
        await engine.close()

    asyncio.run(run())


def test_a_node_is_missing():
    """First in the middle of an answer, then for the next question."""

    async def run(swarm: LocalSwarm):
        engine = TextEngine(await asyncio.to_thread(PetalsEngine.connect, DEFAULT_MODEL, swarm.peers))
        try:
            await engine.start(on_lost)
            generation = engine.generate(request(STORY, max_tokens=1000))
            await anext(generation)
            psutil.Process(swarm.nodes[1].child.pid).kill()
            began = time.monotonic()
            with pytest.raises(SwarmUnavailable) as refused:
                async for _ in generation:
                    pass
            assert time.monotonic() - began < 120
            assert "no reachable PC serves" in str(refused.value) and "petals-win serve" in str(refused.value)
            assert not engine.tokens._running

            # The node is forgotten when its announcement ends.
            deadline = time.monotonic() + 120
            while engine.status().ready and time.monotonic() < deadline:
                await asyncio.sleep(0.5)
            assert engine.status().missing_blocks == tuple(range(15, 30))
            assert "15:30" in engine.status().detail
            with pytest.raises(SwarmUnavailable, match="blocks 15:30"):
                await anext(engine.generate(request()))
        finally:
            await engine.close()

    with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30"]) as swarm:
        swarm.wait_until_serving()
        asyncio.run(run(swarm))
