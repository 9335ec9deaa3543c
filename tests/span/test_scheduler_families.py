"""In models of every family, sessions that share passes compute what each computes alone."""

from __future__ import annotations

import random

import pytest
import torch

from petals_win.models.cuts import Cuts
from petals_win.models.source import open_model
from petals_win.span.span import Span
from span.families import FAMILIES

ONE_BY_ONE = {
    "bloom",
    "mpt",
    "falcon",
    "falcon-new",
    "falcon-alibi",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_neo",
    "jetmoe",
    "llama4",
    "llama4_text",
    "deepseek_v32",
    "axk2",
    "dots3_note_text",
    "glm_moe_dsa",
    "longcat_flash",
}


def rows_of(span: Span, batch: int, tokens: int, chance: random.Random) -> torch.Tensor:
    return torch.randn(batch, tokens, span.row.width, generator=torch.Generator().manual_seed(chance.randrange(10**6)))


@pytest.mark.parametrize("family", FAMILIES)
def test_together_as_alone(checkpoint, family):
    source, chance = open_model(str(checkpoint(family))), random.Random(1)
    cuts = Cuts.of(source.config)
    whole, part = (0, cuts.after(4)), (cuts.after(1), cuts.after(3))
    span = Span.load(source, *whole)
    rows, ranges = (1, 2, 1, 1, 3), (whole, whole, whole, part, part)
    pairs = [[span.open(batch, 60, *blocks) for _ in range(2)] for batch, blocks in zip(rows, ranges, strict=True)]
    joint = 0
    # Pasts of different lengths, some longer than the windows of 8 tokens; then decodes, prefills beside them, and reordered rows.
    for lengths in ((3, 13, 0, 6, 9), (1, 1, 11, 1, 1), (1, 2, 1, 7, 1), (12, 1, 1, 1, 1), *([(1, 1, 1, 1, 1)] * 3)):
        order = torch.tensor([chance.randrange(2), chance.randrange(2)]) if sum(lengths) == 5 else None
        groups: dict[object, list] = {}
        for (together, alone), batch, tokens in zip(pairs, rows, lengths, strict=True):
            if tokens == 0:
                continue
            hidden, hypo_ids = rows_of(span, batch, tokens, chance), order if batch == 2 else None
            expected = span.step(alone, hidden, hypo_ids=hypo_ids)
            step = span.begin(together, hidden, hypo_ids=hypo_ids)
            groups.setdefault(span.companions(step) or step, []).append((step, tokens, expected))
        for group in groups.values():
            span.advance([(step, tokens) for step, tokens, _ in group])
            joint += len(group) > 1
            for step, _, expected in group:
                assert torch.isfinite(expected).all()
                size = max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(step.output(), expected, atol=1e-5 * size, rtol=1e-5)
    assert joint == (0 if family in ONE_BY_ONE else 14)


def test_a_pass_of_several_rows_each_and_no_single_one(checkpoint):
    """Attention of a model's own is asked for those that are there, and for nobody else."""
    span, chance = Span.load(open_model(str(checkpoint("gpt_oss"))), 0, 4), random.Random(1)
    pairs = [[span.open(2, 20) for _ in range(2)] for _ in range(2)]
    for tokens in (5, 1, 1):
        hidden = [rows_of(span, 2, tokens, chance) for _ in pairs]
        expected = [span.step(alone, each) for (alone, _), each in zip(pairs, hidden, strict=True)]
        steps = [span.begin(together, each) for (_, together), each in zip(pairs, hidden, strict=True)]
        span.advance([(step, tokens) for step in steps])
        for step, right in zip(steps, expected, strict=True):
            torch.testing.assert_close(step.output(), right, atol=1e-5, rtol=1e-5)
