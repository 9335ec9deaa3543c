"""What every engine keeps, whatever computes: one suite. A test class inherits it and says how its engine is made."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from petals_win.engines.base import (
    ChosenToken,
    ContextTooLong,
    Engine,
    EngineClosed,
    Event,
    Finished,
    Full,
    GenerationRequest,
    ModelNotFound,
    Thought,
    Token,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)
from petals_win.errors import UserError

T = TypeVar("T")
AT_ONCE = 16
SOON_S = 20.0  # at once, on a PC that does three other things


@dataclass
class Subject:
    """An engine that has started, and how a suite that knows nothing of it makes it do things.

    held: how much it holds for answers, in any unit; 0 if nothing runs.
    full: within it, the engine has no room for one answer more, and nobody waits long for it.
    filling: a prompt of so many tokens.
    """

    engine: Engine
    held: Callable[[], int]
    full: Callable[[], contextlib.AbstractAsyncContextManager[None]]
    filling: Callable[[int], str | tuple[int, ...]] = lambda length: (5,) * length

    def asked(self, text: str = "count 5000", **settings: Any) -> GenerationRequest:
        """A question; the answer to the one that is there by default has as many tokens as fit."""
        messages = ({"role": "user", "content": text},)
        model = self.engine.models()[0].id
        return GenerationRequest(**{"model": model, "messages": messages, "temperature": 0, **settings})


@dataclass(frozen=True)
class Whole:
    """A complete answer. calls: the tools that it calls, with their arguments."""

    text: str
    reason: str
    usage: Usage
    chosen: tuple[ChosenToken, ...] = field(default=(), compare=False)
    calls: tuple[tuple[str, str], ...] = ()


async def whole(engine: Engine, request: GenerationRequest) -> Whole:
    """Ask, and check on the way that the events come in the order of the protocol."""
    events: list[Event] = [event async for event in engine.generate(request)]
    assert len(events) >= 2, f"an answer of {events}"
    *tokens, finished, usage = events
    assert isinstance(finished, Finished) and finished.reason in (
        "stop",
        "length",
        "tool_calls",
    ), f"{finished} is no end"
    assert isinstance(usage, Usage), f"{usage} is no usage"
    calls: list[tuple[str, str]] = []
    for event in tokens:
        if isinstance(event, ToolCallBegun):
            assert event.index == len(calls) and event.id and event.name, f"{event} is no call"
            calls.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            assert event.index == len(calls) - 1 and event.text, f"{event} belongs to no call"
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        else:
            assert isinstance(event, Token | Thought) and event.text, f"{event} is no piece of an answer"
    assert finished.reason != "tool_calls" or calls, "it ends by calls that it has not"
    assert finished.reason != "stop" or not calls, "it does not say that it ends by calls"
    said = "".join(event.text for event in tokens if isinstance(event, Token))
    chosen = tuple(each for event in tokens if isinstance(event, Token) for each in event.chosen)
    return Whole(said, finished.reason, usage, chosen, tuple(calls))


async def soon(condition: Callable[[], bool], seconds: float = SOON_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def refusal(engine: Engine, request: GenerationRequest) -> UserError:
    """The error that comes before any event."""
    with pytest.raises(UserError) as raised:
        await anext(engine.generate(request))
    return raised.value


class EngineContract:
    """The suite. `subject` opens and starts an engine of its own for each test, and closes it.

    lacks: what this engine cannot do, of "tools", "logprobs", "token ids", "embeddings" and "counts along": it has to refuse
    that in a sentence. With "told ids", answers come without ids.
    """

    lacks: frozenset[str] = frozenset()

    def subject(self) -> contextlib.AbstractAsyncContextManager[Subject]:
        raise NotImplementedError

    def use(self, action: Callable[[Subject], Awaitable[T]], seconds: float = 120) -> T:
        """Run a coroutine function on a subject; afterwards the engine must hold nothing any more."""

        async def within() -> T:
            async with self.subject() as subject:
                result = await asyncio.wait_for(action(subject), seconds)
                assert await soon(lambda: subject.held() == 0), f"{subject.held()} is held after the last answer"
                return result

        return asyncio.run(within())

    def test_events_come_in_order_and_are_counted(self):
        async def ask(subject: Subject):
            return [await whole(subject.engine, subject.asked(max_tokens=n)) for n in (1, 7)]

        one, seven = self.use(ask)
        assert (one.reason, one.usage.completion_tokens) == ("length", 1)
        assert (seven.reason, seven.usage.completion_tokens) == ("length", 7)
        assert seven.text.startswith(one.text) and seven.usage.prompt_tokens == one.usage.prompt_tokens > 0

    def test_a_longer_prompt_counts_more(self):
        async def ask(subject: Subject):
            asked = [subject.asked(text, max_tokens=1) for text in ("count 50", "count 50 and more")]
            return [(await whole(subject.engine, each)).usage.prompt_tokens for each in asked]

        short, long = self.use(ask)
        assert short < long

    def test_without_a_limit_an_answer_ends_with_the_context(self):
        async def ask(subject: Subject):
            return subject.engine.models()[0].context_length, await whole(subject.engine, subject.asked())

        context, answer = self.use(ask)
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == context
        assert answer.reason == "length"

    def test_a_stop_string_ends_an_answer_and_is_not_shown(self):
        async def ask(subject: Subject):
            free = await whole(subject.engine, subject.asked(max_tokens=30))
            stop = free.text[len(free.text) // 2 :][:2]
            request = subject.asked(max_tokens=30, stop=("nowhere", stop))
            ends = [event async for event in subject.engine.generate(request) if isinstance(event, Finished)]
            return free, stop, await whole(subject.engine, request), ends

        free, stop, stopped, ends = self.use(ask)
        assert [end.stop_string for end in ends] == [stop]
        assert stopped.reason == "stop" and stopped.text == free.text[: free.text.index(stop)]
        assert stopped.usage.completion_tokens <= free.usage.completion_tokens

    @pytest.mark.parametrize("choice", ["auto", "none"])
    def test_tools_may_be_offered(self, choice: str):
        """What answers here calls none of its own accord: the answer is text, as long as was asked for."""

        async def ask(subject: Subject):
            tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
            asked = subject.asked(max_tokens=5, tools=(tool,), tool_choice=choice)
            if "tools" in self.lacks and choice == "auto":
                assert "tools" in str(await refusal(subject.engine, asked))
                asked = replace(asked, tools=())
            return await whole(subject.engine, asked)

        answer = self.use(ask)
        assert (answer.reason, answer.usage.completion_tokens, answer.calls) == ("length", 5, ())
        assert answer.text

    def test_a_seed_repeats_an_answer_whoever_else_asks(self):
        async def ask(subject: Subject):
            def drawn(seed: int) -> Awaitable[Whole]:
                return whole(subject.engine, subject.asked("count 5", temperature=1.0, max_tokens=12, seed=seed))

            alone = [await drawn(seed) for seed in (7, 7, 8)]
            beside, *_ = await asyncio.gather(*(drawn(seed) for seed in (7, 9, 10, 11)))
            return *alone, beside

        first, again, other, beside = self.use(ask)
        assert first == again == beside
        assert first.text != other.text

    def test_log_probabilities_are_those_of_the_text(self):
        if "logprobs" in self.lacks:
            return self.refuses("logprobs", logprobs=0)

        async def ask(subject: Subject):
            def drawn(**settings: Any) -> Awaitable[Whole]:
                return whole(
                    subject.engine, subject.asked("count 50", temperature=1.0, seed=5, max_tokens=12, **settings)
                )

            plain, alone, *told = [await drawn(logprobs=n) for n in (None, 0, 3)]
            stop = plain.text[len(plain.text) // 2 :][:2]
            return plain, alone, *told, stop, await drawn(logprobs=1, stop=(stop,))

        plain, alone, told, stop, stopped = self.use(ask)
        assert plain.chosen == () and plain == alone == told, "telling changes nothing"
        assert b"".join(each.text for each in told.chosen).decode(errors="ignore") == told.text
        assert [each.logprob for each in alone.chosen] == pytest.approx([each.logprob for each in told.chosen])
        assert all(each.likeliest == () for each in alone.chosen)
        for each in told.chosen:
            assert len(each.likeliest) == 3 and each.logprob <= each.likeliest[0].logprob <= 0
            logprobs = [other.logprob for other in each.likeliest]
            assert logprobs == sorted(logprobs, reverse=True)
        assert b"".join(each.text for each in stopped.chosen).startswith(stopped.text.encode())
        assert len(stopped.chosen) < len(told.chosen)

    def test_tokens_are_counted_along_if_asked_for(self):
        if "counts along" in self.lacks:
            return self.refuses("continuous_usage_stats", count_along=True)

        async def ask(subject: Subject):
            return [event async for event in subject.engine.generate(subject.asked(max_tokens=5, count_along=True))]

        *along, finished, usage = self.use(ask)
        assert isinstance(usage, Usage) and isinstance(finished, Finished)
        counts, pieces = along[::2], along[1::2]
        assert all(isinstance(piece, Token) for piece in pieces)
        assert [replace(count, completion_tokens=0) for count in counts] == [
            replace(usage, completion_tokens=0)
        ] * len(counts)
        assert [count.completion_tokens for count in counts] == list(
            range(1, len(counts) + 1)
        ), "one piece for each token"

    def test_sixteen_at_once_answer_as_each_alone(self):
        async def ask(subject: Subject):
            asked = [subject.asked(f"count {n}{n}", max_tokens=4 + n) for n in range(1, AT_ONCE + 1)]
            alone = [await whole(subject.engine, each) for each in asked]
            return alone, await asyncio.gather(*(whole(subject.engine, each) for each in asked))

        alone, at_once = self.use(ask)
        assert at_once == alone
        assert len({answer.text for answer in alone}) > 1, "they all say the same, so the test shows nothing"

    def test_whoever_stops_reading_frees_what_was_held(self):
        async def ask(subject: Subject):
            generation = subject.engine.generate(subject.asked())
            assert isinstance(await anext(generation), Token)
            assert subject.held() > 0
            began = time.monotonic()
            await generation.aclose()
            assert time.monotonic() - began < SOON_S
            assert await soon(lambda: subject.held() == 0), f"{subject.held()} is held by nobody"
            return await whole(subject.engine, subject.asked(max_tokens=3))

        assert self.use(ask).usage.completion_tokens == 3

    @pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1])
    def test_whoever_is_cancelled_frees_what_was_held(self, seconds: float):
        """Before the first token, or between two."""

        async def ask(subject: Subject):
            for _try in range(5):
                tasks = [asyncio.create_task(whole(subject.engine, subject.asked())) for _ in range(3)]
                await asyncio.sleep(seconds)
                if not any(task.done() for task in tasks):
                    break
                await asyncio.gather(
                    *tasks
                )  # they had their whole answers, since this program got no turn for so long
            began = time.monotonic()
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - began < SOON_S
            assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
            assert await soon(lambda: subject.held() == 0), f"{subject.held()} is held by nobody"
            return await whole(subject.engine, subject.asked(max_tokens=3))

        assert self.use(ask).usage.completion_tokens == 3

    def test_one_that_is_cancelled_disturbs_no_other(self):
        async def ask(subject: Subject):
            alone = await whole(subject.engine, subject.asked(max_tokens=40))
            others = [asyncio.create_task(whole(subject.engine, subject.asked(max_tokens=40))) for _ in range(3)]
            leaving = asyncio.create_task(whole(subject.engine, subject.asked()))
            await asyncio.sleep(0.02)
            leaving.cancel()
            return alone, await asyncio.gather(*others)

        alone, others = self.use(ask)
        assert others == [alone] * 3

    def test_an_unknown_model(self):
        async def ask(subject: Subject):
            return await refusal(subject.engine, replace(subject.asked(), model="gpt-5")), subject.engine.models()

        error, (card,) = self.use(ask)
        assert isinstance(error, ModelNotFound) and "gpt-5" in str(error) and card.id in str(error)

    def test_a_prompt_that_leaves_no_room_for_an_answer(self):
        async def ask(subject: Subject):
            context = subject.engine.models()[0].context_length
            by_ids = dict(messages=None, max_tokens=1)
            fits = await whole(subject.engine, subject.asked(**by_ids, prompt=subject.filling(context - 1)))
            return (
                context,
                fits,
                [
                    await refusal(subject.engine, subject.asked(**by_ids, prompt=subject.filling(length)))
                    for length in (context, context + 1)
                ],
            )

        context, fits, errors = self.use(ask)
        assert (fits.usage.prompt_tokens, fits.usage.completion_tokens) == (context - 1, 1)
        for error, length in zip(errors, (context, context + 1), strict=True):
            assert isinstance(error, ContextTooLong)
            assert (error.prompt_tokens, error.context_length) == (length, context)

    def test_full_is_told_as_that_and_passes(self):
        async def ask(subject: Subject):
            async with subject.full():
                began = time.monotonic()
                error = await refusal(subject.engine, subject.asked(max_tokens=5))
                assert time.monotonic() - began < 30
            return error, await whole(subject.engine, subject.asked(max_tokens=5))

        error, answer = self.use(ask)
        assert isinstance(error, Full), f"{error!r}"
        assert answer.usage.completion_tokens == 5

    def test_the_ids_of_an_answer_are_told(self):
        if "token ids" in self.lacks:
            return self.refuses("token", messages=None, prompt=(5, 6))
        if "told ids" in self.lacks:
            return self.use(self._tells_no_ids)

        async def ask(subject: Subject):
            asked = subject.asked(max_tokens=20, messages=None, prompt="count 50")
            events = [event async for event in subject.engine.generate(asked)]
            prompt = await subject.engine.tokenize(asked)
            ids = [token for event in events if isinstance(event, Token | Finished) for token in event.ids]
            halves = [(), ()]
            for end, half in ((8, 0), (12, 1)):
                prompt_so_far = tuple(prompt + [token for part in halves for token in part])
                part = replace(asked, prompt=prompt_so_far, max_tokens=end)
                told = [event async for event in subject.engine.generate(part)]
                halves[half] = tuple(i for event in told if isinstance(event, Token | Finished) for i in event.ids)
            return ids, events[-1], len(prompt), halves

        ids, usage, prompt, halves = self.use(ask)
        assert isinstance(usage, Usage) and len(ids) == usage.completion_tokens == 20
        assert prompt == usage.prompt_tokens
        self.goes_on_with(ids, halves)

    def goes_on_with(self, ids: list[int], halves: list[tuple[int, ...]]) -> None:
        """Asked for the rest by the tokens so far, an engine says the same as at once."""
        assert [token for half in halves for token in half] == ids

    async def _tells_no_ids(self, subject: Subject) -> None:
        events = [event async for event in subject.engine.generate(subject.asked(max_tokens=5))]
        assert not any(event.ids for event in events if isinstance(event, Token | Finished))

    def refuses(self, named: str, **settings: Any) -> None:
        """A request with these settings gets a sentence that names what cannot be done."""

        async def ask(subject: Subject):
            return str(await refusal(subject.engine, subject.asked(**settings)))

        assert named in self.use(ask)

    async def _knows_text_alone(self, subject: Subject) -> None:
        model = subject.engine.models()[0].id
        for name, error in ((model, "token"), ("gpt-5", "no model")):
            with pytest.raises(UserError, match=error):
                await subject.engine.tokenize(GenerationRequest(model=name, prompt="text"))
            with pytest.raises(UserError, match=error):
                await subject.engine.detokenize(name, [5])

    async def _has_no_embeddings(self, subject: Subject) -> None:
        with pytest.raises(UserError, match="embeddings"):
            await subject.engine.embed(subject.engine.models()[0].id, [5])

    def test_text_to_tokens_and_back(self):
        if "token ids" in self.lacks:
            return self.use(self._knows_text_alone)

        async def ask(subject: Subject):
            model, text = subject.engine.models()[0].id, "count 50 and  more"
            plain = GenerationRequest(model=model, prompt=text)
            tokens = await subject.engine.tokenize(plain, special=False)
            chat = await subject.engine.tokenize(subject.asked(text))
            usage = (await whole(subject.engine, subject.asked(text, max_tokens=1))).usage
            empty = await subject.engine.tokenize(GenerationRequest(model=model, prompt=""), special=False)
            with pytest.raises(ModelNotFound):
                await subject.engine.tokenize(replace(plain, model="gpt-5"))
            with pytest.raises(ModelNotFound):
                await subject.engine.detokenize("gpt-5", tokens)
            with pytest.raises(UserError, match="token"):
                await subject.engine.detokenize(model, [2**31 - 1])
            return text, await subject.engine.detokenize(model, tokens), len(chat), usage.prompt_tokens, empty

        text, back, chat, counted, empty = self.use(ask)
        assert back == text and chat == counted and empty == []

    def test_embeddings(self):
        if "embeddings" in self.lacks:
            return self.use(self._has_no_embeddings)

        async def ask(subject: Subject):
            card = subject.engine.models()[0]

            async def embedded(text: str) -> list[float]:
                tokens = await subject.engine.tokenize(GenerationRequest(model=card.id, prompt=text))
                return await subject.engine.embed(card.id, tokens)

            alone = [await embedded(text) for text in ("count 50", "and more")]
            beside = await asyncio.gather(embedded("count 50"), whole(subject.engine, subject.asked(max_tokens=5)))
            token = (await subject.engine.tokenize(GenerationRequest(model=card.id, prompt="count")))[-1]
            longest = await subject.engine.embed(card.id, [token] * card.context_length)
            with pytest.raises(ContextTooLong):
                await subject.engine.embed(card.id, [token] * (card.context_length + 1))
            with pytest.raises(UserError, match="empty"):
                await subject.engine.embed(card.id, [])
            with pytest.raises(ModelNotFound):
                await subject.engine.embed("gpt-5", [token])
            return alone, beside[0], longest

        (one, other), beside, longest = self.use(ask)
        assert one == pytest.approx(beside, abs=1e-5) and one != pytest.approx(other, abs=1e-3)
        assert len(one) == len(other) == len(longest) > 0
        assert all(sum(number * number for number in vector) == pytest.approx(1) for vector in (one, other, longest))

    def test_an_embedding_that_is_given_up_frees_what_was_held(self):
        if "embeddings" in self.lacks:
            return self.use(self._has_no_embeddings)

        async def ask(subject: Subject):
            card = subject.engine.models()[0]
            token = (await subject.engine.tokenize(GenerationRequest(model=card.id, prompt="wait")))[-1]
            for _try in range(20):
                working = asyncio.create_task(subject.engine.embed(card.id, [token] * card.context_length))
                while subject.held() == 0 and not working.done():
                    await asyncio.sleep(0.001)
                if not working.done():
                    break
            working.cancel()
            await asyncio.wait({working}, timeout=SOON_S)
            assert working.cancelled()

        self.use(ask)

    def test_what_it_says_of_itself(self):
        async def ask(subject: Subject):
            return subject.engine.models(), subject.engine.status()

        (card,), status = self.use(ask)
        assert card.id and card.context_length > 0 and abs(card.created - time.time()) < 10**9
        assert status.ready and status.missing_blocks == () and status.detail.endswith(".")

    def test_closing_breaks_off_what_is_running(self):
        async def ask(subject: Subject):
            asked = [asyncio.create_task(whole(subject.engine, subject.asked())) for _ in range(3)]
            reading = subject.engine.generate(subject.asked())
            assert isinstance(await anext(reading), Token)
            began = time.monotonic()
            await subject.engine.close()
            ends = await asyncio.gather(*asked, return_exceptions=True)
            with pytest.raises(EngineClosed):
                async for _ in reading:
                    pass
            assert time.monotonic() - began < SOON_S
            return ends

        ends = self.use(ask)
        assert all(isinstance(end, EngineClosed) for end in ends), ends

    def test_closing_twice_and_asking_afterwards(self):
        async def ask(subject: Subject):
            await subject.engine.close()
            await subject.engine.close()
            return await refusal(subject.engine, subject.asked())

        assert isinstance(self.use(ask), EngineClosed)


@contextlib.asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    """Start an engine, and close it at the end; it must not be lost meanwhile."""
    lost: list[UserError] = []
    try:
        await engine.start(lost.append)
        yield engine
    finally:
        await engine.close()
    assert not lost, f"the engine was lost: {lost[0]}"
