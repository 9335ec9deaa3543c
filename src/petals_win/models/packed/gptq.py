"""GPTQ: integers packed along the inputs, a scale and a zero point for each group of inputs and each output."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from petals_win.models.packed.format import Format, fits, unpacked

_WEIGHT, _ZEROS, _SCALES, _GROUP_OF = ".qweight", ".qzeros", ".scales", ".g_idx"


def gptq(bits: int, group_size: int, less_one: bool) -> Format:
    """`less_one`: zero points are stored less one, as all but the second version of the format do."""
    return Format(
        marks=(_WEIGHT,),
        parts=(_WEIGHT, _ZEROS, _SCALES, _GROUP_OF),
        required=(_WEIGHT, _ZEROS, _SCALES),
        plain=functools.partial(_plain, bits=bits, group_size=group_size, less_one=less_one),
    )


def _plain(parts: Mapping[str, torch.Tensor], bits: int, group_size: int, less_one: bool) -> torch.Tensor:
    numbers = unpacked(parts[_WEIGHT].T.contiguous(), bits).T  # [in, out]
    zeros, scales = unpacked(parts[_ZEROS], bits), parts[_SCALES].float()
    columns, rows = numbers.shape
    fits(
        scales.ndim == 2 and scales.shape[1] == rows and zeros.shape == scales.shape,
        f"it has {rows} outputs, zero points of the shape {list(zeros.shape)} and scales of {list(scales.shape)}",
    )
    size = group_size if group_size > 0 else columns
    group_of = parts[_GROUP_OF].long() if _GROUP_OF in parts else torch.arange(columns) // size
    fits(
        group_of.shape == (columns,) and 0 <= int(group_of.min()) and int(group_of.max()) < len(scales),
        "it names groups of inputs that it has not",
    )
    if less_one:
        # Programs disagree on whether the largest number means the next one or, as it overflows, zero.
        fits(not bool((zeros == 2**bits - 1).any()), "its zero points can be understood in two ways")
        zeros = zeros + 1
    return ((numbers - zeros[group_of]) * scales[group_of]).T
