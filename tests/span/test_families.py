"""Spans, cut anywhere, compute to the last bit what transformers computes: prefill, decode, batches, reordered beams."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from petals_win.models.architecture import find_blocks
from petals_win.models.rows import Row
from petals_win.models.source import ModelSource, open_model
from petals_win.span.lean import LeanBlocks
from petals_win.span.span import Span
from span.equal_logits import cut_of, equal, whole_model
from span.families import FAMILIES, VOCABULARY


@pytest.fixture(autouse=True)
def plain_computing(monkeypatch):
    """Without packed weights and the short way through plain blocks, whose sums differ in the last bit, the spans are to be exact."""
    monkeypatch.setattr("petals_win.span.filling.lay_out_linears", lambda modules: 0)
    monkeypatch.setattr(LeanBlocks, "of", lambda decoder: None)
    monkeypatch.setattr("petals_win.span.native.kernels", lambda: None)


@dataclass
class Blocks:
    """What goes into the first block of a model and comes out of its last, in the rows of models/rows.py."""

    model: PreTrainedModel
    hidden: list[torch.Tensor] = field(default_factory=list)
    own: list[torch.Tensor] = field(default_factory=list)  # what each block gets for itself

    def __post_init__(self):
        def enter(module, args, kwargs):
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            self.hidden.append(next(iter(given.values())).clone())  # whatever a model calls them
            if self.row.own:
                self.own.append(given["per_layer_input"])

        def leave(_module, _args, output):
            self.hidden.append((output[0] if isinstance(output, tuple) else output).clone())

        layers = find_blocks(self.model).layers
        self.row = Row.of(find_blocks(self.model).decoder.config)
        for layer in layers:
            layer.register_forward_pre_hook(enter, with_kwargs=True)
        layers[-1].register_forward_hook(leave)

    @torch.inference_mode()
    def of(self, *arguments, **keywords) -> tuple[torch.Tensor, torch.Tensor]:
        self.hidden.clear()
        self.own.clear()
        self.model(*arguments, **keywords)
        own = torch.cat(self.own, dim=-1) if self.own else None
        return self.row.pack(self.hidden[0], own), self.row.pack(self.hidden[-1], own)


def load(source: ModelSource) -> list[Span]:
    return [Span.load(source, start, end) for start, end in cut_of(source.config)]


def steps_of(spans: list[Span], batch: int, length: int) -> Callable[..., torch.Tensor]:
    sessions = [(span, span.open(batch, length)) for span in spans]

    def step(hidden: torch.Tensor, hypo_ids: torch.Tensor | None = None) -> torch.Tensor:
        for span, session in sessions:
            hidden = span.step(session, hidden, hypo_ids=hypo_ids)
        return hidden

    return step


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(checkpoint, family):
    folder = checkpoint(family)
    blocks = Blocks(whole_model(folder))
    spans = load(open_model(str(folder)))
    batch, prompt, decoded = 2, 13, 6  # past the sliding windows, which see 8 tokens

    step, cache = steps_of(spans, batch, prompt + decoded + 4), DynamicCache(config=blocks.model.config)
    inputs, expected = blocks.of(tokens(batch, prompt), cache=cache, use_cache=True)
    assert equal(step(inputs), expected), "prefill"
    for number in range(decoded):
        inputs, expected = blocks.of(tokens(batch, 1, seed=number), cache=cache, use_cache=True)
        assert equal(step(inputs), expected), f"decode step {number}"

    rows = torch.tensor([1, 1])
    cache.reorder_cache(rows)
    inputs, expected = blocks.of(tokens(batch, 1, seed=90), cache=cache, use_cache=True)
    assert equal(step(inputs, hypo_ids=rows), expected), "reordered"
    inputs, expected = blocks.of(tokens(batch, 3, seed=91), cache=cache, use_cache=True)
    assert equal(step(inputs), expected), "three more tokens at once"

    inputs, hidden = blocks.of(tokens(batch, prompt), use_cache=False)
    for span in spans:
        inputs = span.forward(inputs, span.start, span.end)
    assert equal(inputs, hidden), "forward without a cache"
