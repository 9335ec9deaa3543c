"""The scheduler: many sessions in one pass compute what each computes alone, and nobody's fault is another's."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from petals_win.models.source import ModelSource, open_model
from petals_win.span import scheduler as scheduler_module
from petals_win.span.chunks import Decodes
from petals_win.span.compute import ComputeThread
from petals_win.span.scheduler import Scheduler
from petals_win.span.span import Span

HIDDEN = 64


@pytest.fixture(scope="module")
def source(checkpoint) -> ModelSource:
    return open_model(str(checkpoint("llama")))


@pytest.fixture
def span(source, compute) -> Span:
    return compute.submit(Span.load, source, 1, 4).result(60)


@pytest.fixture
def scheduler(span, compute) -> Scheduler:
    return Scheduler(span, compute)


@pytest.fixture
def chunks(monkeypatch) -> None:
    """Chunks of 20 tokens, however long they take."""
    monkeypatch.setattr(scheduler_module.Chunks, "tokens", lambda *_: 20)


@pytest.fixture
def passes(span, monkeypatch) -> list[list[int]]:
    """How many tokens of each row of which steps went through the span together, pass by pass."""
    seen: list[list[int]] = []
    advance = span.advance

    def counting(pieces):
        seen.append([min(tokens, step.left) for step, tokens in pieces])
        advance(pieces)

    monkeypatch.setattr(span, "advance", counting)
    return seen


class Gate:
    """Keeps the compute thread busy until it is opened, so that steps gather behind it."""

    def __init__(self, compute: ComputeThread):
        self._opened, begun = threading.Event(), threading.Event()
        compute.submit(lambda: (begun.set(), self._opened.wait(60)))
        assert begun.wait(60)

    def open(self) -> None:
        self._opened.set()


def hidden_states(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


class Chat:
    """A session whose steps go through the scheduler, and another one that makes the same steps alone."""

    def __init__(self, span: Span, scheduler: Scheduler, seed: int, **options):
        self.options = {"batch_size": 1, "max_length": 100, **options}
        self.session, self._alone = span.open(**self.options), span.open(**self.options)
        self._span, self._scheduler, self._seed = span, scheduler, seed
        self._expected: list[torch.Tensor] = []
        self._futures: list = []

    def ask(self, tokens: int, **more) -> None:
        self._seed += 1000
        hidden = hidden_states(tokens, self._seed, self.options["batch_size"])
        self._expected.append(self._span.step(self._alone, hidden, **more))
        self._futures.append(self._scheduler.step(self.session, hidden, **more))

    def check(self) -> None:
        for future, expected in zip(self._futures, self._expected, strict=True):
            assert_close(future.result(30), expected)
        assert self.session.position == self._alone.position
        self._futures, self._expected = [], []


def test_steps_that_wait_are_computed_together(span, scheduler, compute, passes):
    chats = [Chat(span, scheduler, seed, batch_size=1 + seed % 2) for seed in range(4)]
    for lengths in ([3, 1, 7, 2], [1, 1, 1, 1], [1, 5, 1, 2]):
        passes.clear()
        gate = Gate(compute)
        for chat, length in zip(chats, lengths, strict=True):
            chat.ask(length)
        passes.clear()  # of those alone
        gate.open()
        for chat in chats:
            chat.check()
        assert passes == [lengths]


def test_joining_and_leaving_at_random(span, scheduler, compute, passes):
    chance = random.Random(0)
    chats: list[Chat] = []
    for _ in range(40):
        if len(chats) < 8 and chance.random() < 0.6:
            chats.append(Chat(span, scheduler, chance.randrange(10**6), batch_size=chance.choice([1, 1, 2])))
        if chats and chance.random() < 0.1:
            chats.pop(chance.randrange(len(chats))).session.close()
        gate = Gate(compute)
        asked = [chat for chat in chats if chance.random() < 0.8 and chat.session.position < 60]
        for chat in asked:
            chat.ask(chance.choice([1, 1, 1, 2, 20]))
        gate.open()
        for chat in asked:
            chat.check()
    assert max(len(each) for each in passes) > 4


def test_tokens_are_taken_back_beside_others(span, scheduler, compute, passes):
    chats = [Chat(span, scheduler, seed, batch_size=1 + seed % 2) for seed in range(3)]
    for lengths, start in (([9, 3, 5], None), ([1, 4, 2], None), ([1, 1, 30], 2), ([1, 1, 1], 2), ([2, 1, 1], 1)):
        gate = Gate(compute)
        for chat, length in zip(chats, lengths, strict=True):
            chat.ask(length, start=None if chat is chats[0] else start)
        passes.clear()
        gate.open()
        for chat in chats:
            chat.check()
        assert len(passes[0]) == 3
    with pytest.raises(ValueError, match="99 of which cannot be kept"):
        scheduler.step(chats[0].session, hidden_states(1), start=99).result(30)


def test_several_steps_of_one_session_are_made_in_order(span, scheduler, compute):
    chat = Chat(span, scheduler, 1)
    gate = Gate(compute)
    for tokens in (20, 1, 30, 2, 1):
        chat.ask(tokens)
    gate.open()
    chat.check()


def test_ranges_beams_and_prompts(span, scheduler, compute):
    whole, tail, middle = (
        Chat(span, scheduler, i, start=a, end=b) for i, (a, b) in enumerate([(1, 4), (2, 4), (2, 3)])
    )
    others = [Chat(span, scheduler, 10 + i, start=2, end=4, batch_size=2) for i in range(2)]
    prompts = [hidden_states(3, 5), None]
    for rows in ([0, 1], [1, 1], [1, 0]):
        gate = Gate(compute)
        whole.ask(2)
        tail.ask(4, prompts=prompts)
        middle.ask(1)
        for other in others:
            other.ask(1, hypo_ids=torch.tensor(rows))
        gate.open()
        for chat in (whole, tail, middle, *others):
            chat.check()


def test_a_decode_waits_for_one_chunk_at_most(span, scheduler, compute, passes, chunks):
    chats = [Chat(span, scheduler, seed) for seed in range(3)]
    gate = Gate(compute)
    for chat, tokens in zip(chats, (50, 1, 70), strict=True):
        chat.ask(tokens)
    passes.clear()
    gate.open()
    for chat in chats:
        chat.check()
    assert passes[0] == [1, 20], "the decode goes along with the first chunk"
    assert [tokens for turn in passes[1:] for tokens in turn] == [20, 20, 20, 10, 10, 20], "prefills go round"


def test_a_step_that_fails_harms_nobody(span, scheduler, compute, passes):
    good = [Chat(span, scheduler, seed) for seed in range(3)]
    for chat in good:
        chat.ask(5)
        chat.check()
    bad, full, closed = span.open(1, 10), span.open(1, 10), span.open(1, 10)
    closed.close()
    gate = Gate(compute)
    poisoned = hidden_states(2)

    def fail(_module, args):
        if (args[0] == poisoned[0, 0, 0]).any():
            raise RuntimeError("out of memory")

    span._joint._lean = span._joint._native = None  # the short ways call no modules
    hook = span._decoder.layers[0].input_layernorm.register_forward_pre_hook(fail)
    futures = [
        scheduler.step(bad, poisoned),
        scheduler.step(full, hidden_states(11)),
        scheduler.step(closed, poisoned),
    ]
    for chat in good:
        chat.ask(1)
    passes.clear()
    gate.open()
    for future, message in zip(futures, ("out of memory", "holds 10 tokens", "closed"), strict=True):
        with pytest.raises((RuntimeError, ValueError), match=message):
            future.result(30)
    for chat in good:
        chat.check()
    hook.remove()
    assert passes == [[2, 1, 1, 1], [2], [1], [1], [1]]
    assert bad.position == full.position == 0
    assert_close(scheduler.step(bad, poisoned).result(30), span.step(span.open(1, 10), poisoned))


def test_a_step_that_was_cancelled_before_its_turn(span, scheduler, compute, passes):
    chat, session = Chat(span, scheduler, 1), span.open(1, 10)
    gate = Gate(compute)
    future = scheduler.step(session, hidden_states(1))
    chat.ask(1)
    passes.clear()
    assert future.cancel()
    gate.open()
    chat.check()
    assert passes == [[1]] and session.position == 0


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_prefill_that_is_given_up_in_its_middle(span, scheduler, compute, monkeypatch, chunks, how):
    chat, session = Chat(span, scheduler, 1), span.open(1, 100)
    scheduler.step(session, hidden_states(3)).result(30)
    advance, seen = span.advance, []

    def counting(pieces):
        advance(pieces)
        seen.append(session.position)
        if seen[-1] == 43:
            assert future.cancel() if how == "cancelled" else session.close() is None

    monkeypatch.setattr(span, "advance", counting)
    gate = Gate(compute)
    future = scheduler.step(session, hidden_states(90))
    gate.open()
    with pytest.raises(CancelledError if how == "cancelled" else ValueError):
        future.result(30)
    monkeypatch.setattr(span, "advance", advance)
    chat.ask(2)
    chat.check()
    if how == "cancelled":
        assert seen == [23, 43] and session.position == 3
        assert scheduler.step(session, hidden_states(97)).result(30).shape == (1, 97, HIDDEN)


def test_the_end_of_the_compute_thread_ends_all_waiting(source, monkeypatch):
    compute = ComputeThread()
    compute.start()
    span = compute.submit(Span.load, source, 1, 2).result(60)
    scheduler = Scheduler(span, compute)
    gate = Gate(compute)
    futures = [scheduler.step(span.open(1, 10), hidden_states(2)) for _ in range(3)]
    join = compute.join
    monkeypatch.setattr(compute, "join", lambda timeout: (gate.open(), join(timeout)))  # once the stop is asked for
    compute.stop()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(30)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shutting down"):
            scheduler.step(span.open(1, 10), hidden_states(2)).result(5)

    async def ask():
        with pytest.raises(RuntimeError, match="shutting down"):
            await scheduler.step(span.open(1, 10), hidden_states(2))

    asyncio.run(asyncio.wait_for(ask(), 5))


def test_steps_of_one_turn_of_an_event_loop_share_a_pass_and_come_back_together(span, scheduler, monkeypatch):
    passes, advance, looked = list[int](), span.advance, list[int]()
    monkeypatch.setattr(span, "advance", lambda group: (passes.append(len(group)), advance(group)))

    async def ask():
        sessions = [span.open(1, 10) for _ in range(6)]
        steps = [asyncio.ensure_future(scheduler.step(session, hidden_states(1))) for session in sessions]
        for step in steps:
            step.add_done_callback(lambda _: looked.append(sum(each.done() for each in steps)))
        await asyncio.gather(*steps)

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert passes == [6] and looked == [6] * 6


def test_an_error_that_is_no_step_s_own_is_told_to_all(span, scheduler, compute, monkeypatch):
    def breaks(*_turn):
        raise ZeroDivisionError("float division by zero")

    with monkeypatch.context() as broken:
        broken.setattr(scheduler, "_compute_turn", breaks)
        gate = Gate(compute)
        futures = [scheduler.step(span.open(1, 10), hidden_states(tokens)) for tokens in (1, 2)]
        gate.open()
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(30)
    assert scheduler.step(span.open(1, 10), hidden_states(2)).result(30).shape == (1, 2, HIDDEN)


def test_calls_of_others_go_between_the_chunks_of_a_prefill(span, scheduler, compute, passes, chunks):
    gate = Gate(compute)
    future = scheduler.step(span.open(1, 100), hidden_states(90))
    between = compute.submit(lambda: len(passes))
    passes.clear()
    gate.open()
    assert between.result(30) == 1
    assert future.result(30).shape == (1, 90, HIDDEN)


def test_decodes_that_come_again_are_thought_of_between_their_turns(span, scheduler, monkeypatch):
    asked = []
    monkeypatch.setattr(scheduler_module, "_PAUSE_S", 60.0)
    monkeypatch.setattr(scheduler_module.Chunks, "tokens", lambda _, decodes, _room: asked.append(decodes) or 20)
    decoding, reading = span.open(1, 10), span.open(1, 100)
    scheduler.step(reading, hidden_states(20)).result(30)
    scheduler.step(decoding, hidden_states(1)).result(30)
    scheduler.step(reading, hidden_states(20)).result(30)
    monkeypatch.setattr(scheduler_module, "_PAUSE_S", 0.0)
    scheduler.step(reading, hidden_states(20)).result(30)
    assert asked == [Decodes.NOWHERE, Decodes.HERE, Decodes.ELSEWHERE, Decodes.NOWHERE]


@pytest.mark.usefixtures("chunks")
def test_a_prompt_rests_until_decodes_come_again_or_stay_away(span, scheduler, passes, monkeypatch):
    decoding, reading = span.open(1, 10), span.open(1, 100)
    scheduler.step(decoding, hidden_states(1)).result(30)
    monkeypatch.setattr(scheduler_module.Chunks, "rest_s", 30.0)
    prompt = scheduler.step(reading, hidden_states(60))
    for _ in range(2):
        scheduler.step(decoding, hidden_states(1)).result(30)
    assert passes == [[1], [1, 20], [1, 20]] and not prompt.done()
    monkeypatch.setattr(scheduler_module.Chunks, "rest_s", 0.1)
    assert scheduler.step(decoding, hidden_states(1)).result(30).shape == prompt.result(30).shape[:1] + (1, HIDDEN)
    assert passes[3:] == [[1, 20]]

    prompt = scheduler.step(reading, hidden_states(40))
    assert prompt.result(30).shape == (1, 40, HIDDEN) and passes[4:] == [[20], [20]], "nobody decodes any more"
