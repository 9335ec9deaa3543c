"""Two spans of the same three blocks, whose weights lie differently, compute the same."""

from __future__ import annotations

import torch

from petals_win.span.span import Span


def assert_equal_within_rounding(span: Span, plain: Span) -> None:
    assert span.weight_bytes == plain.weight_bytes
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 64)
    session, theirs = span.open(2, 8), plain.open(2, 8)
    for tokens in (hidden, hidden[:, :1], hidden[:, :1]):
        expected = plain.step(theirs, tokens)
        assert (span.step(session, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    grad, expected_grad = (each.backward(hidden, hidden, 0, 3)[0] for each in (span, plain))
    assert (grad - expected_grad).abs().max() <= 1e-4 * expected_grad.abs().max()
