"""Blocks with a sliding window: what it has left behind takes no memory, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from petals_win.models.source import open_model
from petals_win.span import cache as module
from petals_win.span.cache import KvShape, SessionCache
from petals_win.span.scheduler import Scheduler
from petals_win.span.session import Session
from petals_win.span.span import Span
from petals_win.span.state import CannotTruncate

HIDDEN, WINDOW = 64, 8
FAMILIES = ["gemma3_text", "mistral"]  # every second block, and all, have a window


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """So that 60 tokens are moved many times."""
    monkeypatch.setattr(module, "BEYOND_WINDOW", 4)
    monkeypatch.setattr(module, "ROOM_BEYOND", 6)
    monkeypatch.setattr("petals_win.span.span.BEYOND_WINDOW", 4)
    monkeypatch.setattr("petals_win.span.span.ROOM_BEYOND", 6)


@pytest.fixture(params=FAMILIES)
def span(request, checkpoint) -> Span:
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2} if request.param == "gemma3_text" else {}
    folder = checkpoint(request.param, num_hidden_layers=4, sliding_window=WINDOW, **more)
    return Span.load(open_model(str(folder)), 0, 4)


def states(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def slots(session: Session) -> list[int]:
    return [layer.keys.shape[2] for layer in session.open_cache.layers]


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 1, 1, 1, 20, 1, 5, 1, 1, 22]])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_computes_what_it_would_with_all_of_the_past(span, pieces, rows):
    hidden, session = states(60, rows), span.open(rows, 60, room=10)
    expected, done = span.forward(hidden, 0, 4), 0
    for tokens in pieces:
        session.room = 60
        close(span.step(session, hidden[:, done : done + tokens]), expected[:, done : done + tokens])
        done += tokens
    windows = [shape.window for shape in span._shapes]
    assert slots(session) == [60 if window is None else WINDOW + 10 for window in windows]
    assert session.open_cache.nbytes == span.session_bytes(rows, 60) < rows * 60 * span.cache_bytes_per_token
    assert span.longest_session(span.session_bytes(rows, 60), 1000, rows) >= 60
    assert span.longest_session(span.session_bytes(rows, 60) - 1, 60, rows) < 60


def test_sessions_of_all_lengths_in_one_pass(span, compute):
    scheduler, hidden = Scheduler(span, compute), [states(70, seed=seed) for seed in range(4)]
    expected = [span.forward(each, 0, 4) for each in hidden]
    sessions = [span.open(1, 70) for _ in hidden]
    begun = [
        scheduler.step(session, each[:, : 3 + 13 * n])
        for n, (session, each) in enumerate(zip(sessions, hidden, strict=True))
    ]
    for n, future in enumerate(begun):
        close(future.result(30), expected[n][:, : 3 + 13 * n])
    for step in range(20):
        futures = [
            scheduler.step(session, each[:, 3 + 13 * n + step :][:, :1])
            for n, (session, each) in enumerate(zip(sessions, hidden, strict=True))
        ]
        for n, future in enumerate(futures):
            close(future.result(30), expected[n][:, 3 + 13 * n + step :][:, :1])


def test_the_last_tokens_can_be_taken_back_and_no_others(span):
    hidden, session = states(60), span.open(1, 60)
    expected = span.forward(hidden, 0, 4)
    assert span.takes_back(60) == 4 and span.takes_back(WINDOW + 10) == WINDOW + 10
    done = 0
    while done + 5 <= 60:  # as drafts do: of five tokens four were wrong
        close(span.step(session, hidden[:, done : done + 5]), expected[:, done : done + 5])
        done += 1
        span.step(session, states(1), start=done + 3)
        session.truncate(done)
    with pytest.raises(CannotTruncate):
        session.truncate(1)
    assert session.position == done
    close(span.step(session, hidden[:, done : done + 1]), expected[:, done : done + 1])


def test_a_long_step_that_fails_half_way_closes_its_session(span, monkeypatch):
    session, whole = span.open(1, 60), span.advance
    span.step(session, states(3))

    def failing(pieces):
        whole(pieces)
        if session.position > 40:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(span, "advance", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        span.step(session, states(57))
    assert session.cache is None, "what the windows have left is gone"


def test_what_is_left_for_later_sessions(span):
    hidden, session = states(60), span.open(1, 60)
    expected = span.forward(hidden, 0, 4)
    span.step(session, hidden[:, :50])
    state = session.leave(48)
    assert state is not None and state.position == 48
    again = span.open(1, 60, past=(state, 48))
    assert again.position == 48
    close(span.step(again, hidden[:, 48:]), expected[:, 48:])
    anew = span.open(1, 60, past=(state, 16))
    assert anew.position == 0, "nothing is left of what 16 tokens need"
    close(span.step(anew, hidden), expected)


def test_beams_and_random_pasts():
    shape = KvShape(2, 3, 2, 5, WINDOW, torch.float32)
    cache = SessionCache([shape], 0, 2, 100, torch.device("cpu"))
    cache.fill(50, torch.Generator().manual_seed(0))
    (layer,) = cache.layers
    before = layer.keys.clone()
    assert before.shape == (2, 2, WINDOW + 10, 3)
    cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, before[[1, 1]])
    keys, values = cache.update(torch.ones(2, 2, 2, 3), torch.ones(2, 2, 2, 5), 0)
    assert keys.shape == (2, 2, WINDOW + 1, 3) and values.shape[3] == 5
    assert torch.equal(keys[:, :, :-2], before[[1, 1]][:, :, -(WINDOW - 1) :])
