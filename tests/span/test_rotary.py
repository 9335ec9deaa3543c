"""Rotary tables that depend on a text's length are those of its declared length, in chunks, in a joint pass and on the way past the limit."""

from __future__ import annotations

import copy

import pytest
import torch

from petals_win.models.source import open_model
from petals_win.span.span import Span
from span.equal_logits import whole_model
from span.test_families import Blocks, tokens

SHORT, LONG = 30, 50  # tokens: up to the first, texts have the table of short ones
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SHORT,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
MODELS = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": SHORT}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SHORT}),
    "dynamic, not plain": ("gpt_neox", {"rope_parameters": DYNAMIC, "max_position_embeddings": SHORT}),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=MODELS)
def model(request, checkpoint) -> tuple[Span, Blocks]:
    family, changes = MODELS[request.param]
    folder = checkpoint(family, **copy.deepcopy(changes))  # configurations write into what they are given
    return Span.load(open_model(str(folder)), 0, 4), Blocks(whole_model(folder))


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("pieces", [(20, 9, 1), (1, 28, 1), (30,)])
def test_in_pieces_as_at_once(model, length, pieces):
    """Also where the first pieces end before the limit and the last ones beyond it."""
    span, blocks = model
    inputs, expected = blocks.of(tokens(2, length), use_cache=False)
    session, outputs = span.open(2, length), []
    for size in (*pieces, *[1] * (length - sum(pieces))):
        outputs.append(span.step(session, inputs[:, session.position : session.position + size]))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **CLOSE)


def test_each_session_has_its_own(model):
    """Those that may share a pass do, and get what each gets alone."""
    span, blocks = model
    lengths = (
        12,
        SHORT,
        40,
        LONG,
        LONG,
    )  # by length, since transformers keeps a dynamic table for shorter texts that follow
    texts = [blocks.of(tokens(1, length, seed=length), use_cache=False) for length in lengths]
    sessions = [span.open(1, length) for length in lengths]
    for first, last in ((0, 10), (10, 11), (11, 12)):
        groups: dict = {}
        for session, (inputs, expected) in zip(sessions, texts, strict=True):
            step = span.begin(session, inputs[:, first:last])
            companions = span.companions(step)
            assert companions is not None
            groups.setdefault(companions, []).append((step, expected[:, first:last]))
        assert sorted(map(len, groups.values())) in ([2, 3], [1, 2, 2])  # all long texts, or those of one length
        for group in groups.values():
            span.advance([(step, last - first) for step, _ in group])
            for step, expected in group:
                torch.testing.assert_close(step.output(), expected, **CLOSE)


def test_the_declared_length_counts_not_what_this_node_can_hold(model):
    span, blocks = model
    inputs, expected = blocks.of(tokens(1, LONG), use_cache=False)
    session = span.open(1, SHORT, declared=LONG)
    torch.testing.assert_close(span.step(session, inputs[:, :8]), expected[:, :8], **CLOSE)


def test_a_long_text_goes_on_from_no_other_one(model):
    """What was kept was turned by another table."""
    span, _ = model
    assert [span.may_be_taken_up(length) for length in (SHORT, SHORT + 1)] == [True, False]
    kept, hidden = span.open(1, SHORT), torch.randn(1, 9, 64)
    span.step(kept, hidden)
    state = kept.leave(8)
    assert state is not None
    assert span.open(1, SHORT, past=(state, 8)).position == 8
    assert span.open(1, LONG, past=(state, 8)).position == 0
