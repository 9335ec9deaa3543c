"""The output layer of a model, for one answer's token and for those of several answers at once.

Knows that a plain layer and a packed one differ by the number of rows. Does not know models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from petals_win.host.threads import computing
from petals_win.models.eight_bits import Scaled
from petals_win.models.four_bits import Unread
from petals_win.span.int4 import FewBitsLinear
from petals_win.span.int8 import Int8Weight
from petals_win.span.layouts import fastest_layout, lay_out, seconds_of
from petals_win.span.linear import linear_weight
from petals_win.span.native import NativeLinear
from petals_win.span.packed_linear import packed_if_possible

logger = logging.getLogger(__name__)

_SEVERAL = 4  # rows from which on the packed layer is taken, if it is faster for _TRIED_ROWS
_TRIED_ROWS, _TRIED_ROUNDS = 8, 3


def fast_head(head: nn.Module, embedding: nn.Module, stored: Unread[Scaled] | None = None) -> nn.Module:
    """What computes as `head` does, as fast as this PC can.

    `embedding` is the model's, which may have the same weight. `stored` is the head's weight as its file has it, if that is in eight bits:
    then it stays so, and loses nothing.
    """
    weight = linear_weight(head)
    if weight is None:
        return head
    if isinstance(head, nn.Linear) and (few_bits := Int8Weight.of(stored)) is not None:
        return FewBitsLinear(few_bits, head.bias, weight.device, weight.dtype)
    if (native := NativeLinear.of(head)) is not None:
        return native
    shared = getattr(embedding, "weight", None)
    if shared is None or shared.data_ptr() != weight.data_ptr():
        return lay_out(head)
    if fastest_layout(weight.shape[0], weight.shape[1], weight.dtype) == "packed":
        return packed_if_possible(head)
    # The embedding's weight stays as it is. Where one row is slower for a packed copy of it, several may still be several times
    # as fast.
    packed = packed_if_possible(head)
    return _HeadForSeveral(head, packed) if packed is not head and _faster(packed, head, weight) else head


class _HeadForSeveral(nn.Module):
    """A plain layer for few rows and a packed one for more. Frozen."""

    def __init__(self, plain: nn.Module, packed: nn.Module) -> None:
        super().__init__()
        self.plain, self.packed = plain, packed

    @property
    def weight(self) -> Any:
        """[vocabulary, hidden], as the model's embedding has it, too."""
        return self.plain.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., vocabulary]."""
        several = inputs.numel() >= _SEVERAL * inputs.shape[-1]
        return self.packed(inputs) if several else self.plain(inputs)


@torch.inference_mode()
def _faster(one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor], weight: torch.Tensor) -> bool:
    inputs = torch.ones(_TRIED_ROWS, weight.shape[1], dtype=weight.dtype)
    with computing():
        rounds = [(seconds_of(one, inputs), seconds_of(other, inputs)) for _ in range(_TRIED_ROUNDS)]
    return min(first for first, _ in rounds) < min(second for _, second in rounds)
