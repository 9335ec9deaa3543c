"""Blocks with recurrent states, in spans that start within a period, compute what one process does for the whole text at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_win.models.architecture import find_blocks
from petals_win.models.source import open_model
from petals_win.span.cache import SessionCache
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.span.recurrent import COPIES
from petals_win.span.scheduler import Scheduler
from petals_win.span.session import Session
from petals_win.span.span import Span
from petals_win.span.state import CannotTruncate
from span.families import VOCABULARY
from span.hybrids import HYBRIDS

CLOSE = 1e-4  # of the largest number


class Whole:
    """The model in one process, without a cache: what goes into its first block and comes out of its last."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers = find_blocks(self.model).layers

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = [
            self.layers[0].register_forward_pre_hook(
                lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
                with_kwargs=True,
            ),
            self.layers[-1].register_forward_hook(
                lambda _, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
            ),
        ]
        self.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen[0], seen[1]


def spans_of(folder: Path) -> list[Span]:
    source = open_model(str(folder))
    return [Span.load(source, *cut) for cut in ((0, 1), (1, 4), (4, source.num_blocks))]


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= CLOSE * expected.abs().max().clamp(min=1)


def through(spans: list[Span], sessions: list[Session], hidden: torch.Tensor, **how) -> torch.Tensor:
    for span, session in zip(spans, sessions, strict=True):
        hidden = span.step(session, hidden, **how)
    return hidden


@pytest.mark.parametrize("family", HYBRIDS)
def test_prefill_chunks_decode_and_beams(checkpoint, family):
    folder = checkpoint(family)
    whole, spans = Whole(folder), spans_of(folder)
    ids = tokens(2, 29)
    hidden, expected = whole(ids)
    for pieces in ([13, *[1] * 16], [2, 7, 1, 19]):
        sessions, done = [span.open(2, 40, room=10) for span in spans], 0
        for session in sessions:
            session.room = 40
        for count in pieces:
            got = through(spans, sessions, hidden[:, done : done + count])
            close(got, expected[:, done : done + count])
            done += count
    rows, more = torch.tensor([1, 1]), tokens(2, 3, seed=2)
    hidden, expected = whole(torch.cat([ids[rows], more], dim=1))
    close(through(spans, sessions, hidden[:, 29:30], hypo_ids=rows), expected[:, 29:30])
    close(through(spans, sessions, hidden[:, 30:]), expected[:, 30:])
    for span, session in zip(spans, sessions, strict=True):
        assert session.open_cache.nbytes <= span.session_bytes(2, 40)
    for span in spans:
        hidden = span.forward(hidden, span.start, span.end)
    close(hidden, expected)


@pytest.mark.parametrize("family", HYBRIDS)
def test_sessions_of_all_lengths_at_once(checkpoint, compute, family):
    folder = checkpoint(family)
    whole, span = Whole(folder), Span.load(open_model(str(folder)), 0, 6)
    whole.layers = whole.layers[:6]
    scheduler = Scheduler(span, compute)
    texts = [whole(tokens(rows, 40, seed=seed)) for seed, rows in enumerate((1, 2, 1, 1))]
    sessions = [span.open(len(hidden), 40) for hidden, _ in texts]
    done = [3, 20, 1, 33]
    waiting = [scheduler.step(each, text[0][:, :n]) for each, text, n in zip(sessions, texts, done, strict=True)]
    for future, text, n in zip(waiting, texts, done, strict=True):
        close(future.result(30), text[1][:, :n])
    for _ in range(4):
        waiting = [
            scheduler.step(each, text[0][:, n : n + 1]) for each, text, n in zip(sessions, texts, done, strict=True)
        ]
        for future, text, n in zip(waiting, texts, done, strict=True):
            close(future.result(30), text[1][:, n : n + 1])
        done = [n + 1 for n in done]


@pytest.fixture(params=["qwen3_next", "falcon_h1"])
def mixed(request, checkpoint) -> tuple[Whole, Span]:
    folder = checkpoint(request.param)
    whole = Whole(folder)
    return whole, Span.load(open_model(str(folder)), 0, 6)


def test_a_pass_that_fails_half_way_changes_nothing(mixed, monkeypatch):
    whole, span = mixed
    hidden, expected = whole(tokens(1, 12))
    session = span.open(1, 40)
    span.step(session, hidden[:, :5])

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = span._decoder.layers[3].register_forward_hook(fail)
    for count in (1, 4):
        with pytest.raises(RuntimeError, match="out of memory"):
            span.step(session, hidden[:, 5 : 5 + count])
    hook.remove()
    close(span.step(session, hidden[:, 5:11]), expected[:, 5:11])
    close(span.step(session, hidden[:, 5:12], start=5), expected[:, 5:12])


def test_a_state_is_never_cut_where_it_was_not_kept(mixed):
    whole, span = mixed
    hidden, _ = whole(tokens(1, 12))
    session = span.open(1, 40)
    span.step(session, hidden[:, :5])
    span.step(session, hidden[:, 5:11])
    assert span.takes_back(40) == 0, "so nobody guesses ahead"
    for position in (1, 4, 6, 10):
        with pytest.raises(CannotTruncate):
            span.step(session, hidden[:, :1], start=position)
        assert session.position == 11
    session.truncate(0)
    close(span.step(session, hidden), whole(tokens(1, 12))[1])


def test_a_prompt_is_left_at_its_last_whole_page(mixed):
    whole, span = mixed
    prompt = 2 * PAGE_TOKENS + 30
    ids = tokens(1, prompt + 5 + PAGE_TOKENS)
    hidden, expected = whole(ids)
    session = span.open(1, 400)
    close(span.step(session, hidden[:, :prompt]), expected[:, :prompt])
    for n in range(prompt, prompt + 5 + PAGE_TOKENS):  # the answer has a page of its own
        close(span.step(session, hidden[:, n : n + 1]), expected[:, n : n + 1])
    assert session.open_cache.nbytes == span.session_bytes(1, 400)
    state = session.leave(3 * PAGE_TOKENS)
    assert state is not None and state.position == 2 * PAGE_TOKENS
    assert state.nbytes == sum(
        shape.state_bytes // COPIES + 2 * PAGE_TOKENS * shape.bytes_per_token for shape in span._shapes
    )
    assert [position for position in (64, 100, 128, 192) if state.leads_to(position)] == [128]
    other = torch.cat([ids[:, : 2 * PAGE_TOKENS], tokens(1, 9, seed=7)], dim=1)
    hidden, expected = whole(other)
    again = span.open(1, 400, past=(state, 2 * PAGE_TOKENS))
    assert again.position == 2 * PAGE_TOKENS
    close(span.step(again, hidden[:, 2 * PAGE_TOKENS :]), expected[:, 2 * PAGE_TOKENS :])
    assert span.open(1, 400, past=(state, PAGE_TOKENS)).position == 0, "of one page it has no state"


def test_memory_is_planned_for_states(mixed):
    _, span = mixed
    states = sum(shape.state_bytes for shape in span._shapes)
    assert states > 0
    assert span.session_bytes(1, 1) > states
    assert span.longest_session(states - 1, 1000) < 1
    cache = span.open(1, 64).open_cache
    assert isinstance(cache, SessionCache)
    cache.free()
    assert cache.nbytes == 0
