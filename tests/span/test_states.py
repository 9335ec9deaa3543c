"""Whatever a session keeps: a state that cannot go back, and what sessions leave behind for later ones."""

from __future__ import annotations

import pytest
import torch

from petals_win.models.source import open_model
from petals_win.span.prefixes import PAGE_TOKENS, Prefixes
from petals_win.span.scheduler import Scheduler
from petals_win.span.session import Session
from petals_win.span.span import Span
from petals_win.span.state import CannotTruncate

HIDDEN = 64


class Recurrent:
    """One vector for each row, whatever has been seen: it cannot be cut, only copied."""

    truncates = False
    capacity = 1000

    def __init__(self, rows: int, position: int = 0, held: torch.Tensor | None = None):
        self.position, self.freed = position, False
        self.held = torch.zeros(rows, HIDDEN) if held is None else held

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    def grow(self, capacity: int) -> None:
        self.capacity = max(capacity, self.capacity)

    def shrink(self, capacity: int) -> None:
        self.capacity = min(capacity, self.capacity)

    def truncate(self, position: int) -> None:
        raise CannotTruncate("It has forgotten how it was")

    def leads_to(self, position: int) -> bool:
        return position == self.position

    def keep(self, position: int) -> bool:
        return False

    def fork(self, position: int, capacity: int) -> Recurrent:
        if position != self.position:
            raise CannotTruncate("It has forgotten how it was")
        return Recurrent(len(self.held), position, self.held.clone())

    def reorder(self, rows: torch.Tensor) -> None:
        self.held = self.held[rows]

    def free(self) -> None:
        self.freed = True


@pytest.fixture
def span(checkpoint, monkeypatch) -> Span:
    """Its blocks add up what each row has seen, with half of what was before."""
    span = Span.load(open_model(str(checkpoint("llama"))), 1, 4)
    span._joint.works = False

    def run(hidden, start, end, state, prompts=None):
        outputs = []
        for token in hidden.unbind(1):
            state.held = 0.5 * state.held + token
            outputs.append(state.held)
            if (token == 99).any():
                raise RuntimeError("out of memory")
        return torch.stack(outputs, dim=1)

    monkeypatch.setattr(span._decoder, "run", run)
    return span


def opened(rows: int = 1) -> Session:
    return Session(rows, 1000, 1000, 1000, 1, 4, "", Recurrent(rows))


def states(tokens: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_a_failed_step_leaves_a_state_that_cannot_go_back_as_it_was(span):
    failing, other = opened(2), opened(2)
    for session in (failing, other):
        span.step(session, states(5, rows=2))
    bad = torch.cat([states(2, 1, 2), torch.full((2, 1, HIDDEN), 99.0)], dim=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        span.step(failing, bad, hypo_ids=torch.tensor([1, 1]))
    assert failing.position == 5
    assert torch.equal(span.step(failing, states(3, 2, 2)), span.step(other, states(3, 2, 2)))


def test_it_says_so_when_tokens_are_to_be_taken_back(span):
    session = opened()
    span.step(session, states(5))
    with pytest.raises(CannotTruncate):
        span.step(session, states(1), start=3)
    expected = span.step(opened(), torch.cat([states(5), states(1, 1)], dim=1))[:, 5:]
    assert torch.equal(span.step(session, states(1, 1), start=5), expected)


def test_a_prefill_that_is_given_up_in_its_middle(span, compute, monkeypatch):
    monkeypatch.setattr("petals_win.span.scheduler.Chunks.tokens", lambda *_: 20)
    scheduler, session, advance = Scheduler(span, compute), opened(), span.advance
    expected = span.step(opened(), torch.cat([states(3), states(2, 1)], dim=1))[:, 3:]
    scheduler.step(session, states(3)).result(30)

    def cancelling(pieces):
        advance(pieces)
        assert future.cancel()

    monkeypatch.setattr(span, "advance", cancelling)
    compute.submit(lambda: None).result(30)
    future = scheduler.step(session, states(90, 5))
    with pytest.raises(BaseException):  # noqa: B017, PT011  (CancelledError is none of Exception)
        future.result(30)
    monkeypatch.setattr(span, "advance", advance)
    assert torch.equal(scheduler.step(session, states(2, 1)).result(30), expected)


def test_what_it_leaves_is_of_use_where_it_ended(span):
    session = opened()
    span.step(session, states(PAGE_TOKENS))
    state = session.leave(PAGE_TOKENS)
    assert state is not None and session.cache is None
    again = span.open(1, 1000, past=(state, PAGE_TOKENS))
    expected = span.step(opened(), torch.cat([states(PAGE_TOKENS), states(4, 1)], dim=1))[:, PAGE_TOKENS:]
    assert torch.equal(span.step(again, states(4, 1)), expected)
    assert again.leave(PAGE_TOKENS) is None and again.cache is None, "and of none before that"


class Left(Recurrent):
    def __init__(self, nbytes: int):
        super().__init__(1)
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def leads_to(self, position: int) -> bool:
        return True


def pages(text: str) -> list[bytes]:
    return [text[: end + 1].encode() for end in range(len(text))]


def test_the_longest_common_beginning_is_found_for_its_owner_alone(compute):
    prefixes = Prefixes(compute)
    one, other = Left(10), Left(7)
    prefixes.keep("me", pages("abcd"), one)
    prefixes.keep("me", pages("abxy"), other)
    for asked, state, count in (("abcdef", one, 4), ("abce", one, 3), ("abxyz", other, 4)):
        assert prefixes.find("me", pages(asked)) == (state, count)
    for asked in ("b", "", "xabcd"):
        assert prefixes.find("me", pages(asked)) is None
    assert prefixes.find("you", pages("abcd")) is None
    assert prefixes.find("me", pages("abcd")[1:]) is None, "not where it was left"
    assert prefixes.nbytes == 17


def test_what_was_not_used_for_longest_goes_first(compute):
    prefixes, states_left = Prefixes(compute), {name: Left(10) for name in "abc"}
    for name, state in states_left.items():
        prefixes.keep("me", pages(name), state)
    prefixes.find("me", pages("ax"))
    prefixes.shrink(20)
    assert prefixes.find("me", pages("b")) is None and prefixes.nbytes == 20
    prefixes.shrink(-5)
    assert prefixes.nbytes == 0 and not prefixes._left and not prefixes._by_page
    compute.submit(lambda: None).result(10)
    assert all(state.freed for state in states_left.values())


@pytest.mark.parametrize("computing", [True, False])
def test_all_of_it_goes_at_the_end(compute, computing):
    prefixes, before, after = Prefixes(compute), Left(10), Left(10)
    prefixes.keep("me", pages("ab"), before)
    if not computing:
        compute.stop()
    prefixes.close()
    prefixes.keep("me", pages("cd"), after)
    if computing:
        compute.submit(lambda: None).result(10)
    assert before.freed and after.freed and prefixes.nbytes == 0


def test_nothing_is_kept_twice(compute):
    prefixes, (first, same, longer, shorter) = Prefixes(compute), (Left(10) for _ in range(4))
    prefixes.keep("me", pages("ab"), first)
    prefixes.keep("me", pages("ab"), same)
    prefixes.keep("me", pages("abcd"), longer)
    prefixes.keep("me", pages("abc"), shorter)
    compute.submit(lambda: None).result(10)
    assert [state.freed for state in (first, same, longer, shorter)] == [True, True, False, True]
    assert prefixes.nbytes == 10 and prefixes.find("me", pages("ab")) == (longer, 2)
