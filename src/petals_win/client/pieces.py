"""Into how long chunks a long step is cut. Knows sizes. Does not know sessions or networks."""

from __future__ import annotations

import torch

# Tokens of all rows together. On one node: nodes compute in pieces of this length, and those of other versions take no fewer. On
# several: a chunk is on one while the next chunk is on the one before.
_ALONE, _PIPELINED = 1024, 256
_BYTES = 4 * 2**20
# What is longer is not pushed from node to node: a message of its own may have 4 MiB, with all that goes along.
_PUSHED_BYTES = 2 * 2**20


def chunk_tokens(hidden: torch.Tensor, nodes: int) -> int:
    """How many tokens of a step [batch, tokens, hidden] go to a node at once, on a route over so many nodes."""
    batch_size, _, hidden_size = hidden.shape
    by_bytes = _BYTES // (batch_size * hidden_size * hidden.element_size())
    return max(1, min((_PIPELINED if nodes > 1 else _ALONE) // batch_size, by_bytes))


def chunk_end(sent: int, position: int, end: int, size: int, at_least: int = 0) -> int:
    """Where the chunk ends that begins at token `sent` of a step over the tokens [position, end), with all before it sent anew.

    Chunks of the step itself begin at the same tokens on every node, whatever it was sent before. `at_least` so many tokens of a
    session stay together, such as those that deep prompts are added to.
    """
    stop = end if sent >= position else position
    return min(max(sent + size, at_least), stop)


def may_be_pushed(hidden: torch.Tensor) -> bool:
    """Whether nodes may pass hidden states of this size straight on to each other."""
    return hidden.numel() * hidden.element_size() <= _PUSHED_BYTES
