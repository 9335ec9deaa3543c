"""What bitsandbytes keeps of a linear layer: eight bits with a scale for each row, or four bits of a table with one for each block."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

from petals_win.models.packed.format import CannotUnpack, Format, fits

_LARGEST = ".SCB"
_MAP, _MAXIMA = ".weight.quant_map", ".weight.absmax"
_NESTED_MAP, _NESTED_MAXIMA = ".weight.nested_quant_map", ".weight.nested_absmax"
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


def int8() -> Format:
    return Format(
        marks=(_LARGEST,),
        parts=(".weight", _LARGEST, ".weight_format"),
        required=(".weight", _LARGEST),
        plain=_of_eight_bits,
    )


def four_bits() -> Format:
    return Format(
        marks=_STATES,
        parts=(".weight", _MAP, _MAXIMA, _NESTED_MAP, _NESTED_MAXIMA, *_STATES),
        required=(".weight", _MAP, _MAXIMA),
        plain=_of_four_bits,
    )


def _of_eight_bits(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight, largest = parts[".weight"], parts[_LARGEST]
    fits(weight.dtype == torch.int8 and weight.ndim == 2, f"it is {weight.dtype} of the shape {list(weight.shape)}")
    fits(largest.numel() == len(weight), f"it has {len(weight)} rows and {largest.numel()} scales")
    fits(int(parts.get(".weight_format", torch.tensor(0)).max()) == 0, "its rows are not in order")
    return weight.float() * (largest.float().reshape(-1, 1) / 127)


def _of_four_bits(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    try:
        (state,) = (parts[name] for name in _STATES if name in parts)
        said = json.loads(bytes(state.tolist()))
        shape, block = [int(size) for size in said["shape"]], int(said["blocksize"])
        maxima = parts[_MAXIMA]
        if _NESTED_MAXIMA in parts:
            coarse = parts[_NESTED_MAXIMA].repeat_interleave(int(said["nested_blocksize"]))[: maxima.numel()]
            maxima = parts[_NESTED_MAP][maxima.long()] * coarse + float(said["nested_offset"])
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as e:
        raise CannotUnpack(f"what it says of itself is damaged ({e})") from e
    packed = parts[".weight"].flatten()
    fits(packed.dtype == torch.uint8 and parts[_MAP].numel() == 16, f"it is stored as {packed.dtype}")
    count = math.prod(shape)
    fits(
        block > 0 and packed.numel() == -(-count // 2) and maxima.numel() == -(-count // block),
        f"it is to have the shape {shape}, but has {packed.numel()} bytes and {maxima.numel()} scales",
    )
    numbers = parts[_MAP].float()[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()][:count]
    return (numbers * maxima.float().repeat_interleave(block)[:count]).reshape(shape)
