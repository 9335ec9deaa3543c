"""compressed-tensors' pack-quantized: integers of four or eight bits in words of 32, with scales by row or by group of inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from petals_win.models.four_bits import Groups, UnreadGroups
from petals_win.models.packed.format import Format, fits, unpacked, unread

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_ZERO, _GROUP_OF = ".weight_zero_point", ".weight_g_idx"


def pack_quantized(bits: int, in_order: bool) -> Format:
    """`in_order`: groups are of neighbours, GROUP of them or a multiple."""
    return Format(
        marks=(_PACKED,),
        parts=(_PACKED, _SCALE, _SHAPE, _ZERO, _GROUP_OF),
        required=(_PACKED, _SCALE, _SHAPE),
        plain=functools.partial(_plain, bits=bits),
        groups=functools.partial(_groups, bits=bits) if bits == 4 and in_order else None,
        left_out=(".input_scale", ".input_zero_point"),
    )


@dataclass(frozen=True)
class _Parts:
    """Of a weight [rows, columns], that fit each other."""

    packed: torch.Tensor  # int32 [rows, words]
    scale: torch.Tensor  # float32 [rows or 1, groups]
    zero: torch.Tensor  # of the scales' shape, on both sides of nothing, as the numbers
    group_of: torch.Tensor  # int64 [columns]
    bits: int

    def numbers(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Of rows, [rows, columns]."""
        return unpacked(self.packed[start:stop], self.bits)[:, : len(self.group_of)] - 2 ** (self.bits - 1)


def _plain(parts: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    found = _fitting(parts, bits)
    return (found.numbers() - found.zero[:, found.group_of]) * found.scale[:, found.group_of]


def _groups(parts: Mapping[str, torch.Tensor], bits: int) -> UnreadGroups | None:
    found = _fitting(parts, bits)
    rows, columns, half = len(found.packed), len(found.group_of), 2 ** (bits - 1)
    in_order = torch.arange(columns) // (columns // found.scale.shape[1])
    fits(torch.equal(found.group_of, in_order), "its inputs are in another order than its config.json says")
    zero, scale = (part.expand(rows, -1) for part in (found.zero + half, found.scale))
    return unread(
        rows,
        lambda start, stop: Groups.of_points(found.numbers(start, stop) + half, zero[start:stop], scale[start:stop]),
    )


def _fitting(parts: Mapping[str, torch.Tensor], bits: int) -> _Parts:
    fits(parts[_SHAPE].numel() == 2, "it has no two dimensions")
    rows, columns = (int(size) for size in parts[_SHAPE])
    packed, scale = parts[_PACKED], parts[_SCALE].float()
    in_word = 32 // bits
    fits(
        packed.shape == (rows, -(-columns // in_word)),
        f"it is to have the shape {[rows, columns]}, but is packed in {list(packed.shape)}",
    )
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    groups = scale.shape[-1]
    fits(
        scale.shape in ((rows, groups), (1, 1)) and columns % groups == 0,
        f"its scales have the shape {list(scale.shape)}",
    )
    group_of = torch.arange(columns) // (columns // groups)
    if (named := parts.get(_GROUP_OF)) is not None and (named >= 0).all():
        fits(named.shape == (columns,) and int(named.max()) < groups, "it names groups of inputs that it has not")
        group_of = named.long()
    zero = torch.zeros_like(scale)
    if (stored := parts.get(_ZERO)) is not None:
        if stored.dtype == torch.int32 and stored.shape != scale.shape:  # packed along the rows
            fits(stored.shape == (-(-rows // in_word), groups), f"its zero points have the shape {list(stored.shape)}")
            stored = (unpacked(stored.T.contiguous(), bits).T[:rows] - 2 ** (bits - 1)).to(torch.int16)
        fits(stored.shape == scale.shape, f"its zero points have the shape {list(stored.shape)}")
        zero = stored
    return _Parts(packed, scale, zero, group_of, bits)
