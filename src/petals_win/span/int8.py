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


def int8_bytes(rows: int, columns: int) -> int:
    """What a weight takes: a byte for each value, and two for each scale."""
    return _padded(rows) * columns + 2 * _padded(rows) * (columns // NEIGHBOURS)


class Int8Panels(Panels):
    """As src/kernels/blocks.c says."""

    kind = INT8
    group_bytes = (4 + GROUP) * PANEL

    @classmethod
    def fill(cls, panels: torch.Tensor, some: Scaled) -> None:
        """These panels from as many rows of a weight as there are."""
        panels.copy_(cls.pack(*_whole_panels(some)))

    @staticmethod
    def pack(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """[panels, groups, bytes]: the scales of either half of a group's inputs, then the levels, outputs side by side."""
        panels, groups = len(levels) // PANEL, levels.shape[1] // GROUP
        parts = (part.reshape(panels, PANEL, groups, -1).permute(0, 2, 3, 1) for part in (scales, levels))
        return torch.cat([part.contiguous().view(torch.uint8).flatten(2) for part in parts], -1)


class Int8Weight(FewBits):
    """A weight in eight bits on the CPU."""

    def __init__(self, scaled: Scaled | Unread[Scaled]) -> None:
        rows, columns = scaled.shape
        super().__init__(rows, columns, Int8Panels.of(scaled, _padded(rows), torch.device("cpu")))

    @classmethod
    def of(cls, scaled: Scaled | Unread[Scaled] | None) -> Int8Weight | None:
        """None where there are no kernels for the weight, or for this processor."""
        return None if scaled is None or scaled.shape[1] % GROUP or kernels() is None else cls(scaled)


def _padded(rows: int) -> int:
    return -(-rows // PANEL) * PANEL


def _whole_panels(scaled: Scaled) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, and scales in 16 bits, of some rows, and of as many without any as the last panel lacks."""
    lacking = (0, 0, 0, -len(scaled.levels) % PANEL)
    scales = scaled.scale.to(torch.float16)
    if not scales.isfinite().all():
        raise UserError("The model has weights that eight bits cannot stand for: too large, or no numbers.")
    return pad(scaled.levels, lacking), pad(scales, lacking)
