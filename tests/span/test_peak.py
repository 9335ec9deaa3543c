"""What a pass takes on a card: no card is here, so torch's counters are made up, and the blocks compute on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petals_win.errors import UserError
from petals_win.models.source import open_model
from petals_win.span import peak
from petals_win.span.peak import bytes_of_a_pass
from petals_win.span.span import Span

MIB = 2**20


class Counters:
    """Of a card on which each step of `span` takes as many MiB as it has tokens, for a moment."""

    def __init__(self, span: Span, monkeypatch: pytest.MonkeyPatch):
        self.now, self.most, self.steps = 10 * MIB, 99_999 * MIB, list[tuple[int, int, int]]()
        step = span.step

        def counted(session: Any, hidden: torch.Tensor) -> torch.Tensor:
            self.steps.append((session.start, session.end, hidden.shape[1]))
            self.most = max(self.most, self.now + hidden.shape[1] * MIB)
            return step(session, hidden)

        def reset(_device: torch.device) -> None:
            self.most = self.now

        # Only what is asked of the device: it is said to be a card, and computes on the CPU.
        self.span: Any = SimpleNamespace(
            device=torch.device("cuda", 0),
            dtype=span.dtype,
            row=span.row,
            kinds=span.kinds,
            piece_tokens=64,
            start=span.start,
            end=span.end,
            open=span.open,
            step=counted,
        )
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)


@pytest.fixture
def span(checkpoint) -> Span:
    return Span.load(open_model(str(checkpoint("gemma2"))), 1, 4)


def test_one_block_of_each_kind_is_tried_after_a_long_text(span, monkeypatch):
    monkeypatch.setattr(peak, "_PAST", 128)
    counters = Counters(span, monkeypatch)
    assert bytes_of_a_pass(counters.span, 100_000) == 64 * MIB
    tried = {(start, end) for start, end, _ in counters.steps}
    assert len(tried) == 2 and all(end == start + 1 for start, end in tried), "windows, and none"
    assert len(counters.steps) == 2 * 3 and {tokens for *_, tokens in counters.steps} == {64}


@pytest.mark.parametrize(("context", "passes", "tokens"), [(256, 4, 64), (100, 1, 64), (40, 1, 40)])
def test_no_further_than_the_model_was_made_for(span, monkeypatch, context, passes, tokens):
    counters = Counters(span, monkeypatch)
    assert bytes_of_a_pass(counters.span, context) == tokens * MIB
    assert len(counters.steps) == 2 * passes


def test_no_room_to_compute(span, monkeypatch):
    counters = Counters(span, monkeypatch)

    def full(*_step: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    counters.span.step = full
    with pytest.raises(UserError, match="1:4 leave no memory on cuda:0 to compute with. Serve fewer"):
        bytes_of_a_pass(counters.span, 256)


def test_a_cpu_does_not_count(span):
    assert bytes_of_a_pass(span, 256) == 0
