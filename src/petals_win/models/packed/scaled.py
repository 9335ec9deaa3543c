"""Weights of eight bits with one scale for the tensor, each row, each group of a row's inputs, or each block of rows and inputs.

FP8 as DeepSeek, Qwen and FBGEMM have it, and compressed-tensors' float-quantized and int-quantized.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from petals_win.models.packed.format import Format, fits

_SCALES = (".weight_scale_inv", ".weight_scale")
_STORED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def scaled(block: tuple[int, int] | None) -> Format:
    """`block` is how many rows and inputs share a scale where it is blocks that do."""
    return Format(
        marks=_SCALES,
        parts=(".weight", *_SCALES, ".weight_zero_point"),
        required=(".weight",),
        plain=functools.partial(_plain, block=block),
        left_out=(".input_scale", ".activation_scale", ".input_scale_ub", ".input_zero_point", ".k_scale", ".v_scale"),
    )


def _plain(parts: Mapping[str, torch.Tensor], block: tuple[int, int] | None) -> torch.Tensor:
    weight, scales = parts[".weight"], [parts[ending] for ending in _SCALES if ending in parts]
    fits(weight.ndim == 2 and weight.dtype in _STORED, f"it is {weight.dtype} of the shape {list(weight.shape)}")
    fits(len(scales) == 1, "it has scales of two kinds")
    scale = scales[0]
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)  # exponents alone
    fits(scale.dtype.is_floating_point, f"its scales are {scale.dtype}")
    numbers = weight.float()
    if (zero := parts.get(".weight_zero_point")) is not None:
        fits(zero.shape == scale.shape, "it has more zero points than scales, or less")
        numbers = numbers - _spread(zero.float(), weight, block)
    return numbers * _spread(scale.float(), weight, block)


def _spread(scale: torch.Tensor, weight: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """The scale of each of the weight's numbers, or of each row or of all."""
    rows, columns = weight.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale.unsqueeze(1)
    fits(scale.ndim == 2, f"its scales have the shape {list(scale.shape)}")
    if block is not None:
        wanted = (-(-rows // block[0]), -(-columns // block[1]))
        fits(
            tuple(scale.shape) == wanted,
            f"it has scales for {list(scale.shape)} blocks where {list(wanted)} are needed",
        )
        return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    groups = scale.shape[1]
    fits(
        scale.shape[0] == rows and columns % groups == 0,
        f"it has the shape {[rows, columns]} and scales of the shape {list(scale.shape)}",
    )
    return scale if groups == 1 else scale.repeat_interleave(columns // groups, 1)
