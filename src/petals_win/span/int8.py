"""Weights in eight bits, as a file has them, which our own kernels multiply with on a CPU.

Knows how the kernels want them. Does not know files or models.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from petals_win.errors import UserError
from petals_win.kernels.library import GROUP, INT8, PANEL, kernels
from petals_win.models.eight_bits import NEIGHBOURS, Scaled
from petals_win.models.four_bits import Unread
from petals_win.span.int4 import FewBits, Panels

_AT_ONCE = 2**20  # weights that are packed at once


def int8_bytes(rows: int, columns: int) -> int:
    """What a weight takes: a byte for each value, and two for each scale."""
    return _padded(rows) * columns + 2 * _padded(rows) * (columns // NEIGHBOURS)


class Int8Panels(Panels):
    """As src/kernels/blocks.c says."""

    kind = INT8

    def __init__(self, scaled: Scaled | Unread[Scaled]) -> None:
        torch.nn.Module.__init__(self)
        self.register_buffer("panels", _panels(scaled), persistent=False)


class Int8Weight(FewBits):
    """A weight in eight bits on the CPU."""

    def __init__(self, scaled: Scaled | Unread[Scaled]) -> None:
        rows, columns = scaled.shape
        super().__init__(rows, columns, Int8Panels(scaled))

    @classmethod
    def of(cls, scaled: Scaled | Unread[Scaled] | None) -> Int8Weight | None:
        """None where there are no kernels for the weight, or for this processor."""
        return None if scaled is None or scaled.shape[1] % GROUP or kernels() is None else cls(scaled)


def _padded(rows: int) -> int:
    return -(-rows // PANEL) * PANEL


def _panels(scaled: Scaled | Unread[Scaled]) -> torch.Tensor:
    """uint8 [panels, groups, bytes]: the scales of either half of a group's inputs, then the levels, outputs side by side."""
    rows, columns = scaled.shape
    groups = columns // GROUP
    packed = torch.empty(_padded(rows) // PANEL, groups, (2 * GROUP // NEIGHBOURS + GROUP) * PANEL, dtype=torch.uint8)
    step = max(_AT_ONCE // columns // PANEL, 1) * PANEL
    for start in range(0, rows, step):
        some = scaled[start : start + step]
        lacking = -len(some.levels) % PANEL
        scale = pad(some.scale.to(torch.float16), (0, 0, 0, lacking)).view(-1, PANEL, groups, GROUP // NEIGHBOURS)
        levels = pad(some.levels, (0, 0, 0, lacking)).view(-1, PANEL, groups, GROUP)
        if not scale.isfinite().all():
            raise UserError("The model has weights that eight bits cannot stand for: too large, or no numbers.")
        parts = [part.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2) for part in (scale, levels)]
        packed[start // PANEL :][: len(parts[0])] = torch.cat(parts, -1)
    return packed
