"""The decode loop on blocks in this process: the same texts as transformers' generate(), for many answers at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from span.families import FAMILIES, VOCABULARY
from torch import nn
from transformers import LogitsProcessorList, PreTrainedModel

from petals_win.client import decode
from petals_win.client.choosing import Sampler, WeighedToken, processors_of_generate
from petals_win.client.decode import DecodeLoop
from petals_win.client.drafts import Pace
from petals_win.client.ends import Ends
from petals_win.client.hollow import hollow_model
from petals_win.errors import NodeFull
from petals_win.host.futures import AwaitableFuture
from petals_win.models.source import open_model
from petals_win.span.compute import ComputeThread
from petals_win.span.span import Session, Span

LENGTHS = (1, 13, 5, 30, 2, 8, 21, 3)  # of prompts that are answered at once
LIMIT = 10
CLOSE = 1e-4  # between the two best logits, where sums in another order may decide


class LocalSession:
    """A session of a span of all blocks, as if they were elsewhere."""

    def __init__(self, blocks: LocalBlocks, max_length: int) -> None:
        self._blocks = blocks
        self._session: Session = blocks.span.open(1, max_length)
        self.steps: list[int] = []
        self.truncated: list[int] = []
        self.closed = False

    @property
    def position(self) -> int:
        return 0 if self.closed else self._session.position

    @property
    def takes_back(self) -> int:
        return self._blocks.takes_back

    def truncate(self, position: int) -> None:
        self.truncated.append(self.position - position)
        self._session.truncate(position)

    async def step(
        self, hidden: torch.Tensor, *, prompts: Any = None, hypo_ids: Any = None, last: int | None = None
    ) -> torch.Tensor:
        assert not self.closed
        self.steps.append(hidden.shape[1])
        await self._blocks.before_a_step(self)
        output = await self._blocks.compute.submit(self._blocks.span.step, self._session, hidden)
        return output if last is None else output[:, -last:]

    async def close(self, tokens: Sequence[int] = ()) -> None:
        self.closed = True
        self._session.close()


class BeginningSession(LocalSession):
    """Whose steps set out from the compute thread, if nothing is to be done before them."""

    def begin(self, hidden: torch.Tensor) -> AwaitableFuture[torch.Tensor] | None:
        if self._blocks.before_a_step != self._blocks._nothing:
            return None
        assert not self.closed and threading.current_thread() is self._blocks.compute
        self.steps.append(hidden.shape[1])
        return self._blocks.compute.submit(self._blocks.span.step, self._session, hidden)

    async def finish(self, begun: AwaitableFuture[torch.Tensor]) -> torch.Tensor:
        return await begun


class LocalBlocks:
    def __init__(self, span: Span, compute: ComputeThread, kind: type[LocalSession]) -> None:
        self.span, self.compute, self._kind = span, compute, kind
        self.sessions: list[LocalSession] = []
        self.takes_back = 0
        self.before_a_step: Callable[[LocalSession], Any] = self._nothing

    async def _nothing(self, _session: LocalSession) -> None:
        return None

    def open(self, max_length: int, tokens: Sequence[int] = ()) -> LocalSession:
        self.sessions.append(self._kind(self, max_length))
        return self.sessions[-1]


class Decoding:
    """A model of one of the families, whole for reference, and cut into what a client and a node have of it."""

    def __init__(self, folder: Path, compute: ComputeThread, kind: type[LocalSession]) -> None:
        source = open_model(str(folder))
        self.whole: PreTrainedModel = source.whole_model()
        self.hollow = hollow_model(source, nn.Identity())
        self.blocks = LocalBlocks(Span.load(source, 0, source.num_blocks), compute, kind)
        self.loop = DecodeLoop(self.hollow, compute)

    def run(self, prompts: Sequence[list[int]], limit: int = LIMIT, ends: set[int] | None = None, **arguments: Any):
        """The answers to all prompts, asked for at once."""

        async def all_of_them() -> list[list[int]]:
            return await asyncio.gather(
                *(self.answer(prompt, limit, ends or set(), **arguments) for prompt in prompts)
            )

        return asyncio.run(asyncio.wait_for(all_of_them(), 60))

    async def answer(
        self,
        prompt: list[int],
        limit: int = LIMIT,
        ends: set[int] | None = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> list[int]:
        session = self.blocks.open(len(prompt) + limit)
        try:
            choose = self.sampler(prompt, limit, seed, **arguments)
            return [
                token
                async for token in self.loop.generate(session, prompt, choose=choose, limit=limit, ends=ends or set())
            ]
        finally:
            await session.close()

    def sampler(self, prompt: list[int], limit: int, seed: int | None, **arguments: Any) -> Sampler:
        if seed is None:
            arguments = {"do_sample": False, **arguments}
        processors = processors_of_generate(self.hollow, torch.tensor([prompt]), max_new_tokens=limit, **arguments)
        return Sampler(processors, None if seed is None else torch.Generator().manual_seed(seed))

    def reference(
        self, prompt: list[int], limit: int = LIMIT, **arguments: Any
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Of transformers' generate(): the answer, and the scores [vocabulary] of each of its tokens."""
        settings = {
            "do_sample": False,
            "max_new_tokens": limit,
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        made = self.whole.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            **settings,
            **arguments,
        )
        return made.sequences[0, len(prompt) :].tolist(), [scores[0] for scores in made.scores]


def assert_same(answer: list[int], reference: tuple[list[int], list[torch.Tensor]]) -> None:
    """Equal, or at the first token that differs the reference could not tell either."""
    tokens, scores = reference
    for mine, theirs, score in zip(answer, tokens, scores, strict=False):
        if mine != theirs:
            best = score.topk(2).values
            assert best[0] - best[1] <= CLOSE
            return
    assert len(answer) == len(tokens)


@pytest.fixture(scope="module")
def compute() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture(scope="module", params=[LocalSession, BeginningSession], ids=["from the loop", "from the thread"])
def kind(request) -> type[LocalSession]:
    return request.param


@pytest.fixture(scope="module")
def made(kind) -> dict[str, Decoding]:
    return {}


@pytest.fixture
def decoding(checkpoint, compute: ComputeThread, made: dict[str, Decoding], kind) -> Callable[[str], Decoding]:
    def make(family: str) -> Decoding:
        if family not in made:
            made[family] = Decoding(checkpoint(family), compute, kind)
        return made[family]

    return make


def some_prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_at_once_are_those_of_generate(decoding, family):
    made = decoding(family)
    prompts = some_prompts()
    settings = {"eos_token_id": None, "no_repeat_ngram_size": 1}  # without which random models repeat a token
    answers = made.run(prompts, **settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same(answer, made.reference(prompt, **settings))
    assert_same(made.run(prompts[:1], eos_token_id=None)[0], made.reference(prompts[0], eos_token_id=None))
    assert made.loop._ends.batched


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_positions_that_cannot_be_given(checkpoint, monkeypatch, family):
    """A decoder that counts positions by its cache alone: found out by numbers where they matter, and then one by one."""
    source = open_model(str(checkpoint(family)))
    right, model = Ends(hollow_model(source, nn.Identity())), hollow_model(source, nn.Identity())
    decoder = model.get_decoder()
    forward = decoder.forward

    def without_positions(input_ids=None, **given):
        if given.pop("position_ids", None) is not None:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return forward(input_ids=input_ids, **given)

    monkeypatch.setattr(decoder, "forward", without_positions)
    ends = Ends(model)
    assert ends.batched == (family != "gpt2")
    ids, positions = torch.tensor([5, 6, 7, 8, 9, 5]), torch.tensor([3, 4, 5, 0, 1, 7])
    assert torch.equal(ends.embed(ids, positions), right.embed(ids, positions))


@pytest.mark.parametrize(
    ("family", "embeds", "heads"),
    [("llama", True, True), ("gemma2", True, False), ("gpt2", False, True), ("bloom", False, True)],
)
def test_ends_are_computed_by_their_modules_alone_where_these_are_all(checkpoint, family, embeds, heads):
    """Not where the decoder norms embeddings or adds to them, nor where logits are capped."""
    model = hollow_model(open_model(str(checkpoint(family))), nn.Identity())
    ends, calls = Ends(model), list[int]()
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    ends.embed(torch.tensor([5, 6]), torch.tensor([3, 9]))
    assert bool(calls) != embeds
    calls.clear()
    logits = ends.logits(hidden := 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    assert bool(calls) != heads
    torch.testing.assert_close(logits, ends._by_the_model(hidden), atol=1e-5, rtol=1e-5)


def test_one_answer_is_the_same_alone_and_beside_others(decoding):
    made = decoding("llama")
    prompts = some_prompts()
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 50}
    alone = [made.run([prompt], seed=seed, **drawn)[0] for seed, prompt in enumerate(prompts)]

    async def at_once() -> list[list[int]]:
        return await asyncio.gather(*(made.answer(p, seed=seed, **drawn) for seed, p in enumerate(prompts)))

    assert asyncio.run(at_once()) == alone
    assert made.run([prompts[0]], seed=99, **drawn)[0] != alone[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(100, 320))},
        {"begin_suppress_tokens": list(range(3, 310))},
        {"forced_eos_token_id": 7},
        {"bad_words_ids": [[230, 230], [9]]},
        {"min_new_tokens": 5, "eos_token_id": list(range(100, 320))},
        {"sequence_bias": {(17,): 100.0}},
        {"exponential_decay_length_penalty": (2, 1.5)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_generate_applies_is_applied(decoding, settings):
    made = decoding("llama")
    (prompt,) = some_prompts([9])
    ends = set(settings.get("eos_token_id", [2]))
    answer = made.run([prompt], ends=ends, **settings)[0]
    assert_same(answer, made.reference(prompt, **settings))
    assert answer != made.run([prompt])[0], "it makes a difference"


def test_settings_of_the_models_own(checkpoint, compute, kind):
    made = Decoding(checkpoint("llama"), compute, kind)
    (prompt,) = some_prompts([9])
    plain = made.run([prompt])[0]
    for model in (made.hollow, made.whole):
        model.generation_config.suppress_tokens = plain[:2]
    assert_same(made.run([prompt])[0], made.reference(prompt))
    assert not set(plain[:2]) & set(made.run([prompt])[0])


def test_an_answer_ends_by_its_limit_or_by_an_end_token(decoding):
    made = decoding("gpt2")
    (prompt,) = some_prompts([6])
    whole = made.run([prompt])[0]
    assert len(whole) == LIMIT
    assert made.run([prompt], limit=1)[0] == whole[:1]
    assert made.blocks.sessions[-1].steps == [6], "nothing is computed for a token that nobody wants"
    end = whole[4]
    assert made.run([prompt], ends={end, 1})[0] == whole[: whole.index(end) + 1]
    assert made.blocks.sessions[-1].steps == [6] + [1] * whole.index(end)


def test_up_to_the_last_position_that_was_learned(decoding):
    made = decoding("gpt2")
    (prompt,) = some_prompts([250])
    assert_same(made.run([prompt], limit=6)[0], made.reference(prompt, limit=6))


def test_all_that_wait_share_a_pass(decoding, monkeypatch):
    made = decoding("llama")
    rows: list[int] = []
    logits = made.loop._ends.logits
    monkeypatch.setattr(made.loop._ends, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    waiting: list[asyncio.Event] = []

    async def together(_session: LocalSession) -> None:
        """Each step waits until all sessions have come to it."""
        waiting.append(asyncio.Event())
        mine = waiting[-1]
        if len(waiting) == len(LENGTHS):
            for event in waiting:
                event.set()
            waiting.clear()
        await mine.wait()

    async def step(self: LocalSession, hidden: torch.Tensor, *, last: int) -> torch.Tensor:
        await together(self)
        return hidden[:, -last:]

    monkeypatch.setattr(LocalSession, "step", step)
    monkeypatch.setattr(made.blocks, "before_a_step", together)
    made.run(some_prompts())
    assert rows == [len(LENGTHS)] * LIMIT


class Guessing:
    """In the place of Drafter: of the answer that will come it guesses as many tokens right as its turn says, and others wrong."""

    rights = (2, 0, 1, 3, 0, 0, 2)
    wrongs = (1, 2, 0, 0, 0, 1, 2)

    def __init__(self, text: list[int], made: list[tuple[int, int]]) -> None:
        self.text, self.made = text, made

    def draft(self, ids: torch.Tensor, most: int) -> list[int]:
        turn, known = len(self.made), len(ids)
        assert ids.tolist() == self.text[:known]
        right = self.text[known : known + self.rights[turn % 7]]
        wrong = [(token + 1) % VOCABULARY for token in self.text[known + len(right) :][: self.wrongs[turn % 7]]]
        draft = (right + wrong)[: max(most, 0)]
        self.made.append((len(draft), min(len(right), len(draft))))
        return draft

    def checked(self, drafted: int, right: int) -> None:
        assert (drafted, right) == self.made[-1]


@pytest.fixture
def guessing(monkeypatch):
    """Makes answers of drafts that Guessing makes, and tells which it made: (length, of which right)."""

    def answer(made: Decoding, prompt: list[int], expected: list[int], **settings: Any):
        drafts: list[tuple[int, int]] = []
        with monkeypatch.context() as patched:
            patched.setattr(decode, "Drafter", lambda _pace: Guessing(prompt + expected, drafts))
            patched.setattr(made.blocks, "takes_back", 100)
            return asyncio.run(made.answer(prompt, **settings)), drafts

    return answer


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
        {"seed": 5, "do_sample": True, "temperature": 1.5, "top_k": 50},
        {"seed": 6, "do_sample": True, "temperature": 2.0, "top_p": 0.9, "min_new_tokens": 8},
    ],
    ids=["greedy", "penalties", "seed", "top-p"],
)
def test_drafts_change_no_token(decoding, guessing, family, settings):
    made = decoding(family)
    (prompt,) = some_prompts([9])
    expected = asyncio.run(made.answer(prompt, 20, **settings))
    answer, drafts = guessing(made, prompt, expected, limit=20, **settings)
    session = made.blocks.sessions[-1]
    assert answer == expected and len(answer) == 20
    assert session.steps == [9] + [1 + length for length, _ in drafts]
    assert sum(length > right for length, right in drafts) in (len(session.truncated), len(session.truncated) + 1)
    assert len(session.steps) < 14, "fewer steps than tokens"


@pytest.mark.parametrize("limit", range(1, 12))
def test_the_limit_in_the_middle_of_a_draft(decoding, guessing, limit):
    made = decoding("llama")
    (prompt,) = some_prompts([9])
    expected = asyncio.run(made.answer(prompt, 20))
    answer, _ = guessing(made, prompt, expected, limit=limit)
    assert answer == expected[:limit]
    assert made.blocks.sessions[-1].position <= 9 + limit - 1, "nothing is computed for a token that nobody wants"


def test_an_end_token_in_the_middle_of_a_draft(decoding, guessing):
    made = decoding("gpt2")
    (prompt,) = some_prompts([6])
    settings = {"no_repeat_ngram_size": 1}  # without which random models repeat a token
    expected = asyncio.run(made.answer(prompt, 12, **settings))
    for number, end in enumerate(expected):
        answer, _ = guessing(made, prompt, expected, limit=12, ends={end}, **settings)
        assert answer == expected[: number + 1]


def test_an_error_in_the_middle_of_a_draft_comes_after_the_tokens(decoding, monkeypatch):
    made = decoding("llama")
    (prompt,) = some_prompts([9])
    expected = asyncio.run(made.answer(prompt, 20))

    class Refusing(Sampler):
        def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
            if ids.shape[1] == 9 + 3:
                raise ZeroDivisionError
            return super().__call__(ids, logits)

    async def run() -> list[int]:
        tokens = []
        choose = Refusing(
            processors_of_generate(made.hollow, torch.tensor([[3]]), max_new_tokens=1, suppress_tokens=[3])
        )
        with pytest.raises(ZeroDivisionError):
            async for token in made.loop.generate(made.blocks.open(40), prompt, choose=choose, limit=20, ends=set()):
                tokens.append(token)
        return tokens

    monkeypatch.setattr(decode, "Drafter", lambda _pace: Guessing(prompt + expected, []))
    monkeypatch.setattr(made.blocks, "takes_back", 100)
    assert asyncio.run(run()) == expected[:3]


def test_log_probabilities_of_guessed_tokens_are_those_of_each_alone(decoding, monkeypatch):
    made = decoding("llama")
    (prompt,) = some_prompts([9])

    async def ask() -> list[WeighedToken]:
        session = made.blocks.open(40)
        choose = Sampler(LogitsProcessorList(), logprobs=2)
        tokens = [t async for t in made.loop.generate(session, prompt, choose=choose, limit=20, ends=set())]
        await session.close()
        return [token for token in tokens if isinstance(token, WeighedToken)]

    plain = asyncio.run(ask())
    assert len(plain) == 20 and all(token == token.likeliest[0][0] for token in plain)
    monkeypatch.setattr(decode, "Drafter", lambda _pace: Guessing(prompt + list(map(int, plain)), []))
    monkeypatch.setattr(made.blocks, "takes_back", 100)
    guessed = asyncio.run(ask())
    assert guessed == plain and len(made.blocks.sessions[-1].steps) < 15
    assert [token.logprob for token in guessed] == pytest.approx([token.logprob for token in plain], abs=1e-4)


def test_text_that_repeats_itself_takes_fewer_steps(decoding, monkeypatch):
    """Of its own accord: random models repeat themselves. Not where tokens cannot be taken back."""
    made = decoding("llama")
    (prompt,) = some_prompts([9])
    monkeypatch.setattr(Pace, "took", lambda *_: None)
    monkeypatch.setattr(Pace, "plain", 1.0)
    monkeypatch.setattr(Pace, "of", lambda *_: 1.0)
    expected = asyncio.run(made.answer(prompt, 100))
    assert len(made.blocks.sessions[-1].steps) == 100
    monkeypatch.setattr(made.blocks, "takes_back", 100)
    assert asyncio.run(made.answer(prompt, 100)) == expected
    assert len(made.blocks.sessions[-1].steps) < 50

    async def beside_a_longer_one() -> list[list[int]]:
        return await asyncio.gather(made.answer(prompt, 100), made.answer(prompt, 250))

    short, longer = asyncio.run(beside_a_longer_one())
    assert short == longer[:100] == expected
    assert len(made.blocks.sessions[-2].steps) == 100, "several answers at once make no drafts"


def test_bad_prompts(decoding):
    made = decoding("llama")
    choose = Sampler(LogitsProcessorList())
    for prompt, limit in (([], 5), ([3], 0)):
        with pytest.raises(ValueError, match="are no answer"):
            asyncio.run(_rest_of(made.loop.generate(made.blocks.open(9), prompt, choose=choose, limit=limit, ends=())))


def test_an_error_of_one_answer_is_no_other_s(decoding, monkeypatch):
    made = decoding("llama")
    prompts = some_prompts([4, 5, 6])
    alone = made.run([prompts[2]])[0]

    class Refusing(Sampler):
        def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
            if ids.shape[1] > 7:
                raise ZeroDivisionError
            return super().__call__(ids, logits)

    async def full(session: LocalSession) -> None:
        if session is made.blocks.sessions[-2] and len(session.steps) == 3:
            raise NodeFull("no room")

    async def one(prompt: list[int], choose: Sampler) -> tuple[list[int], BaseException | None]:
        session, tokens = made.blocks.open(40), []
        try:
            async for token in made.loop.generate(session, prompt, choose=choose, limit=LIMIT, ends=set()):
                tokens.append(token)
        except Exception as e:
            return tokens, e
        return tokens, None

    async def all_of_them():
        suppressing = processors_of_generate(made.hollow, torch.tensor([[3]]), max_new_tokens=1, suppress_tokens=[3])
        samplers = [Refusing(suppressing), Sampler(LogitsProcessorList()), Sampler(LogitsProcessorList())]
        return await asyncio.gather(*(one(p, choose) for p, choose in zip(prompts, samplers, strict=True)))

    monkeypatch.setattr(made.blocks, "before_a_step", full)
    (refused, first), (cut, second), (whole, third) = asyncio.run(all_of_them())
    assert isinstance(first, ZeroDivisionError) and len(refused) == 4
    assert isinstance(second, NodeFull) and len(cut) == 2
    assert third is None and whole == alone


def test_a_session_that_is_closed_meanwhile_does_not_cancel_the_reader(decoding, monkeypatch):
    made = decoding("llama")

    async def closed(session: LocalSession) -> None:
        if len(session.steps) == 3:
            gone = asyncio.get_running_loop().create_future()
            gone.cancel()
            await gone

    monkeypatch.setattr(made.blocks, "before_a_step", closed)

    async def run() -> int:
        session, count = made.blocks.open(40), 0
        choose = Sampler(LogitsProcessorList())
        with pytest.raises(ConnectionAbortedError, match="closed in the middle of a step"):
            async for _ in made.loop.generate(session, [5, 6], choose=choose, limit=LIMIT, ends=set()):
                count += 1
        return count

    assert asyncio.run(run()) == 2


@pytest.mark.parametrize("how", ["aclose", "cancel"])
@pytest.mark.parametrize("slow", ["step", "compute"])
def test_whoever_stops_reading_ends_the_computation(decoding, monkeypatch, how, slow):
    made = decoding("llama")
    prompt, other = some_prompts([4, 5])
    known = made.run([other])[0]
    ended: list[float] = []

    async def never(session: LocalSession) -> None:
        if len(session.steps) > 3:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(time.monotonic())

    if slow == "step":
        monkeypatch.setattr(made.blocks, "before_a_step", never)

    async def run() -> None:
        session = made.blocks.open(240)
        tokens = made.loop.generate(session, prompt, choose=Sampler(LogitsProcessorList()), limit=200, ends=set())
        for _ in range(3):
            await anext(tokens)
        began = time.monotonic()
        if how == "aclose":
            await tokens.aclose()
        else:
            reader = asyncio.create_task(_rest_of(tokens))
            before = len(session.steps)
            while slow == "compute" and len(session.steps) == before:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        assert time.monotonic() - began < 20
        assert len(asyncio.all_tasks()) == 1, "nothing of it is left"
        steps = len(session.steps)
        if slow == "step":
            assert len(ended) == 1
            monkeypatch.undo()
        await asyncio.sleep(0.05)
        assert len(session.steps) == steps < 200
        await session.close()
        assert await made.answer(other) == known

    asyncio.run(run())


async def _rest_of(tokens) -> list[int]:
    return [token async for token in tokens]


def test_the_compute_thread_ends(checkpoint, monkeypatch, kind):
    compute = ComputeThread()
    compute.start()
    made = Decoding(checkpoint("llama"), compute, kind)
    (prompt,) = some_prompts([4])

    async def run() -> None:
        session = made.blocks.open(240)
        tokens = made.loop.generate(session, prompt, choose=Sampler(LogitsProcessorList()), limit=200, ends=set())
        await anext(tokens)
        busy, go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        compute.submit(lambda: loop.call_soon_threadsafe(busy.set) and go.wait(60))
        await busy.wait()
        join = compute.join
        monkeypatch.setattr(compute, "join", lambda timeout: (go.set(), join(timeout)))  # once the stop is asked for
        stop = asyncio.create_task(asyncio.to_thread(compute.stop))
        with pytest.raises((RuntimeError, asyncio.CancelledError)):
            async with asyncio.timeout(60):
                await _rest_of(tokens)
        await stop

    asyncio.run(run())
