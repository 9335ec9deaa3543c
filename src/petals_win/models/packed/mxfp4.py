"""Microscaling FP4, in which gpt-oss has its experts: 32 numbers of four bits share an exponent of eight."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from petals_win.models.packed.format import Format, fits

_BLOCKS, _SCALES = "_blocks", "_scales"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4() -> Format:
    return Format(
        marks=(_BLOCKS, _SCALES), parts=(_BLOCKS, _SCALES), required=(_BLOCKS, _SCALES), plain=_plain, result=""
    )


def _plain(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[experts, out, groups, 16] bytes and [experts, out, groups] exponents to [experts, in, out] in bfloat16, which is exact."""
    blocks, scales = parts[_BLOCKS], parts[_SCALES]
    fits(blocks.dtype == scales.dtype == torch.uint8, f"it is stored as {blocks.dtype} and {scales.dtype}")
    fits(
        blocks.ndim == 4 and blocks.shape[3] == 16 and blocks.shape[:3] == scales.shape,
        f"its blocks have the shape {list(blocks.shape)} and their scales {list(scales.shape)}",
    )
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    experts, rows, groups, _ = blocks.shape
    plain = torch.empty(experts, groups * 32, rows, dtype=torch.bfloat16)
    for expert in range(experts):  # one at a time: on the way a number takes thirty times its size
        pairs = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], dim=-1).flatten(-2)
        exponents = (scales[expert].int() - 127).unsqueeze(-1)
        plain[expert] = torch.ldexp(values[pairs.int()], exponents).reshape(rows, -1).T
    return plain
