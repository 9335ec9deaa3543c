"""NVIDIA's FP4: numbers of four bits, a scale of eight bits (E4M3) for 16 of a row's inputs, and one for the whole weight.

compressed-tensors divides by the latter, ModelOpt multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from petals_win.models.packed.format import Format, fits
from petals_win.models.packed.mxfp4 import MAGNITUDES

_GROUP = 16


def compressed() -> Format:
    """As compressed-tensors names the parts."""
    packed, scale, whole = endings = (".weight_packed", ".weight_scale", ".weight_global_scale")
    return Format(
        marks=(packed, whole),
        parts=endings,
        required=endings,
        plain=lambda parts: _plain(parts[packed], parts[scale], 1 / _whole(parts, whole)),
        left_out=(".input_global_scale",),
    )


def modelopt() -> Format:
    """As ModelOpt does, which may have scales for caches of eight bits, too."""
    packed, scale, whole = endings = (".weight", ".weight_scale", ".weight_scale_2")
    return Format(
        marks=(whole,),
        parts=endings,
        required=endings,
        plain=lambda parts: _plain(parts[packed], parts[scale], _whole(parts, whole)),
        left_out=(".input_scale", ".k_scale", ".v_scale"),
    )


def _whole(parts: Mapping[str, torch.Tensor], ending: str) -> float:
    fits(parts[ending].numel() == 1, f"its{ending} has the shape {list(parts[ending].shape)}")
    whole = float(parts[ending])
    fits(whole > 0, f"its{ending} is {whole}")
    return whole


def _plain(packed: torch.Tensor, scale: torch.Tensor, whole: float) -> torch.Tensor:
    """Bytes [out, in / 2], the even input in the low bits, and scales [out, in / 16] to [out, in] in float32."""
    fits(packed.dtype == torch.uint8 and packed.ndim == 2, f"it is {packed.dtype} of the shape {list(packed.shape)}")
    fits(scale.dtype == torch.float8_e4m3fn, f"its scales are {scale.dtype}")
    rows, columns = len(packed), 2 * packed.shape[1]
    fits(
        columns % _GROUP == 0 and tuple(scale.shape) == (rows, columns // _GROUP),
        f"it has the shape {[rows, columns]} and scales of the shape {list(scale.shape)}",
    )
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    numbers = values[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()]
    return (numbers.view(rows, -1, _GROUP) * (scale.float() * whole).unsqueeze(-1)).view(rows, columns)
