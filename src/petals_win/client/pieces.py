"""How many tokens go to a node in one message. Knows sizes. Does not know sessions or networks."""

from __future__ import annotations

import torch

# Of all rows together: nodes compute in pieces of this length, and those of other versions take no fewer.
_TOKENS = 1024
_BYTES = 32 * 2**20


def piece_tokens(inputs: torch.Tensor, at_least: int = 1) -> int:
    """Into how long pieces to cut inputs [batch, tokens, hidden], so that each has its own deadline and stays small.

    `at_least` so many tokens must stay together, such as those that deep prompts are added to.
    """
    batch_size, _, hidden_size = inputs.shape
    by_bytes = _BYTES // (batch_size * hidden_size * inputs.element_size())
    return max(at_least, min(_TOKENS // batch_size, by_bytes), 1)
