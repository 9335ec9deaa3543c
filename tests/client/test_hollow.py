"""The client's half of every family, with spans in the place of its layers, computes and generates what transformers does."""

from __future__ import annotations

import pytest
import torch
from span.equal_logits import cut_of, equal, whole_model
from span.families import FAMILIES, VOCABULARY
from torch import nn

from petals_win.client import hollow
from petals_win.client.hollow import RemoteCache, hollow_model
from petals_win.models.source import open_model
from petals_win.span.lean import LeanBlocks
from petals_win.span.span import Span

LENGTH = 32
# generate() leaves tokens out of blocks without keys, and keys that are expanded lie otherwise in a cache that grows: sums come in another order.
IN_ANOTHER_ORDER = {"gemma4_text", "gemma4", "gemma4_unified_text", "glm_moe_dsa", "longcat_flash"}


@pytest.fixture(autouse=True)
def plain_computing(monkeypatch):
    """Without packed weights and the short ways through plain blocks, which are tested by themselves."""
    monkeypatch.setattr("petals_win.span.filling.lay_out_linears", lambda modules: 0)
    monkeypatch.setattr(LeanBlocks, "of", lambda decoder: None)
    monkeypatch.setattr("petals_win.span.native.kernels", lambda: None)
    monkeypatch.setattr(hollow, "fast_head", lambda head, *_: head)


class Swarm(nn.Module):
    """Spans, as if each were on a PC of its own."""

    def __init__(self, source) -> None:
        super().__init__()
        self._spans = [Span.load(source, *cut) for cut in cut_of(source.config)]
        self.open(1)

    def open(self, batch: int) -> None:
        self._sessions = [span.open(batch, LENGTH) for span in self._spans]

    def position(self) -> int:
        return self._sessions[0].position

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for span, session in zip(self._spans, self._sessions, strict=True):
            hidden = span.step(session, hidden)
        return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_family(checkpoint, family):
    folder = checkpoint(family)
    whole = whole_model(folder)
    source = open_model(str(folder))
    swarm = Swarm(source)
    model = hollow_model(source, swarm)
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
    swarm.open(2)
    with torch.no_grad():
        logits = model(input_ids=ids, cache=RemoteCache(swarm.position), use_cache=True).logits
        assert equal(logits, whole(ids).logits)

    swarm.open(1)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    settings |= {"attention_mask": torch.ones_like(ids[:1]), "return_dict_in_generate": True}
    made = [
        one.generate(ids[:1], **settings, **cache)
        for one, cache in ((model, {"cache": RemoteCache(swarm.position)}), (whole, {"use_cache": True}))
    ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    for mine, theirs in zip(made[0].logits, made[1].logits, strict=True):
        assert torch.allclose(mine, theirs, atol=5e-5) if family in IN_ANOTHER_ORDER else equal(mine, theirs)
