"""In models of every family, sessions that share passes compute what each computes alone."""

from __future__ import annotations

import random

import pytest
import torch

from petals_win.models.source import open_model
from petals_win.span.span import Span
from span.families import FAMILIES

HIDDEN = 64
ONE_BY_ONE = {
    "bloom",
    "mpt",
    "falcon",
    "falcon-new",
    "falcon-alibi",
    "deepseek_v3",
    "gpt_neo",
    "jetmoe",
    "llama4",
    "llama4_text",
}


def hidden_states(batch: int, tokens: int, chance: random.Random) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(chance.randrange(10**6)))


@pytest.mark.parametrize("family", FAMILIES)
def test_together_as_alone(checkpoint, family):
    span, chance = Span.load(open_model(str(checkpoint(family))), 0, 4), random.Random(1)
    rows, ranges = (1, 2, 1, 1, 3), ((0, 4), (0, 4), (0, 4), (1, 3), (1, 3))
    pairs = [[span.open(batch, 60, *blocks) for _ in range(2)] for batch, blocks in zip(rows, ranges, strict=True)]
    joint = 0
    # Pasts of different lengths, some longer than the windows of 8 tokens; then decodes, prefills beside them, and reordered rows.
    for lengths in ((3, 13, 0, 6, 9), (1, 1, 11, 1, 1), (1, 2, 1, 7, 1), (12, 1, 1, 1, 1), *([(1, 1, 1, 1, 1)] * 3)):
        order = torch.tensor([chance.randrange(2), chance.randrange(2)]) if sum(lengths) == 5 else None
        groups: dict[object, list] = {}
        for (together, alone), batch, tokens in zip(pairs, rows, lengths, strict=True):
            if tokens == 0:
                continue
            hidden, hypo_ids = hidden_states(batch, tokens, chance), order if batch == 2 else None
            expected = span.step(alone, hidden, hypo_ids=hypo_ids)
            step = span.begin(together, hidden, hypo_ids=hypo_ids)
            groups.setdefault(span.companions(step) or step, []).append((step, tokens, expected))
        for group in groups.values():
            span.advance([(step, tokens) for step, tokens, _ in group])
            joint += len(group) > 1
            for step, _, expected in group:
                assert torch.isfinite(expected).all()
                torch.testing.assert_close(step.output(), expected, atol=1e-5, rtol=1e-5)
    assert joint == (0 if family in ONE_BY_ONE else 14)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}


def test_rotary_tables_that_depend_on_the_longest_session(checkpoint):
    """A session beyond the limit shares no pass: its table would be taken for the others, too."""
    rope = {**LONGROPE, "original_max_position_embeddings": 30}
    source = open_model(str(checkpoint("phi3", rope_parameters=rope, original_max_position_embeddings=30)))
    span, chance = Span.load(source, 0, 4), random.Random(1)
    pairs = [[span.open(1, 60) for _ in range(2)] for _ in range(3)]
    for tokens, shared in (((5, 9, 40), 2), ((1, 1, 1), 2), ((1, 1, 1), 2)):
        begun = []
        for (together, alone), length in zip(pairs, tokens, strict=True):
            hidden = hidden_states(1, length, chance)
            begun.append((span.begin(together, hidden), length, span.step(alone, hidden)))
        companions = [each for each in begun if span.companions(each[0]) is not None]
        assert len(companions) == shared
        span.advance([(step, length) for step, length, _ in companions])
        for step, length, expected in begun:
            if step.left:
                span.advance([(step, length)])
            torch.testing.assert_close(step.output(), expected, atol=1e-5, rtol=1e-5)
