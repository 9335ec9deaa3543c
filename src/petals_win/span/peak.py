"""What a pass through a span takes on a card beside weights and caches: inputs, results, masks, repeated keys, scratch memory.

Measured, since it depends on how each operation is computed there. Knows spans and torch's counters. Does not know budgets.
"""

from __future__ import annotations

import torch

from petals_win.errors import UserError
from petals_win.span.shortage import is_shortage
from petals_win.span.span import Span

_PAST = 4096  # tokens before those of the last pass, which its masks and keys reach back to


def bytes_of_a_pass(span: Span, context_length: int) -> int:
    """Of the most tokens that go through the blocks at once, after a long text; 0 where torch does not count (all but NVIDIA cards).

    Blocks have the memory one after the other, so that it is tried out on one of each kind. To be called in the span's own thread.
    Raises UserError if not even that fits.
    """
    if span.device.type != "cuda":
        return 0
    try:
        return max(_bytes_in(span, kind, context_length) for kind in span.kinds)
    except RuntimeError as e:
        if not is_shortage(e):
            raise
        raise UserError(
            f"The blocks {span.start}:{span.end} leave no memory on {span.device} to compute with. Serve fewer blocks, or close other "
            "programs."
        ) from e


def _bytes_in(span: Span, blocks: range, context_length: int) -> int:
    tokens = min(span.piece_tokens, context_length)
    passes = 1 + min(_PAST, context_length - tokens) // tokens
    session = span.open(1, passes * tokens, blocks.start, blocks.stop)
    try:
        before = torch.cuda.memory_allocated(span.device)
        torch.cuda.reset_peak_memory_stats(span.device)
        for _ in range(passes):
            span.step(session, torch.zeros(1, tokens, span.row.width, dtype=span.dtype))
        return torch.cuda.max_memory_allocated(span.device) - before
    finally:
        session.close()
