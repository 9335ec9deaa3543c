"""compressed-tensors' pack-quantized: integers of four or eight bits in words of 32, with scales by row or by group of inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from petals_win.models.packed.format import Format, fits, unpacked

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_ZERO, _GROUP_OF = ".weight_zero_point", ".weight_g_idx"


def pack_quantized(bits: int) -> Format:
    return Format(
        marks=(_PACKED,),
        parts=(_PACKED, _SCALE, _SHAPE, _ZERO, _GROUP_OF),
        required=(_PACKED, _SCALE, _SHAPE),
        plain=functools.partial(_plain, bits=bits),
        left_out=(".input_scale", ".input_zero_point"),
    )


def _plain(parts: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
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
    if (zero := parts.get(_ZERO)) is not None:
        if zero.dtype == torch.int32 and zero.shape != scale.shape:  # packed along the rows
            fits(zero.shape == (-(-rows // in_word), groups), f"its zero points have the shape {list(zero.shape)}")
            zero = unpacked(zero.T.contiguous(), bits).T[:rows] - half
        fits(zero.shape == scale.shape, f"its zero points have the shape {list(zero.shape)}")
        numbers = numbers - zero[:, group_of]
    return numbers * scale[:, group_of]
