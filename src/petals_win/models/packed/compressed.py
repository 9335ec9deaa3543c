"""compressed-tensors' pack-quantized: integers of four or eight bits in words of 32, with scales by row or by group of inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from petals_win.models.four_bits import Groups
from petals_win.models.packed.format import Format, fits, unpacked

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


def _plain(parts: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    numbers, zero, scale, group_of = _numbers(parts, bits)
    return (numbers - zero[:, group_of]) * scale[:, group_of]


def _groups(parts: Mapping[str, torch.Tensor], bits: int) -> Groups:
    numbers, zero, scale, group_of = _numbers(parts, bits)
    rows, columns = numbers.shape
    in_order = torch.arange(columns) // (columns // scale.shape[1])
    fits(torch.equal(group_of, in_order), "its inputs are in another order than its config.json says")
    half = 2 ** (bits - 1)
    return Groups.of_points(numbers + half, (zero + half).expand(rows, -1), scale.expand(rows, -1))


def _numbers(
    parts: Mapping[str, torch.Tensor], bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [out, in] on both sides of nothing, zero points and scales [out or 1, groups], and the group of each input."""
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
    half = 2 ** (bits - 1)
    numbers = unpacked(packed, bits)[:, :columns] - half
    group_of = torch.arange(columns) // (columns // groups)
    if (named := parts.get(_GROUP_OF)) is not None and (named >= 0).all():
        fits(named.shape == (columns,) and int(named.max()) < groups, "it names groups of inputs that it has not")
        group_of = named.long()
    zero = torch.zeros_like(scale)
    if (stored := parts.get(_ZERO)) is not None:
        if stored.dtype == torch.int32 and stored.shape != scale.shape:  # packed along the rows
            fits(stored.shape == (-(-rows // in_word), groups), f"its zero points have the shape {list(stored.shape)}")
            stored = unpacked(stored.T.contiguous(), bits).T[:rows] - half
        fits(stored.shape == scale.shape, f"its zero points have the shape {list(stored.shape)}")
        zero = stored
    return numbers, zero, scale, group_of
