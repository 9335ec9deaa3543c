"""Which format a model's quantization_config describes.

Knows the words of the formats' makers. Whatever it does not know is no format that is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petals_win.models.four_bits import GROUP
from petals_win.models.packed import awq, bitsandbytes, compressed, gptq, mxfp4, nvfp4, scaled
from petals_win.models.packed.format import Format


def format_of(method: str, described: Mapping[str, Any]) -> Format | None:
    """`method` is the quant_method, bitsandbytes also where only its settings tell it. None: it is not read."""
    if method == "fp8":
        return scaled.scaled(_block(described.get("weight_block_size")))
    if method == "fbgemm_fp8":
        return scaled.scaled(None)
    if method == "mxfp4":
        return mxfp4.mxfp4()
    if method == "modelopt":
        return {"NVFP4": nvfp4.modelopt(), "FP8": scaled.scaled(None)}.get(str(described.get("quant_algo")))
    if method == "bitsandbytes":
        return bitsandbytes.four_bits() if described.get("load_in_4bit") else bitsandbytes.int8()
    bits, group_size = described.get("bits", described.get("w_bit", 4)), described.get("group_size", 128)
    if method == "gptq" and bits in (2, 4, 8) and type(group_size) is int:
        form = described.get("checkpoint_format") or "gptq"
        in_order = described.get("desc_act") is False
        return gptq.gptq(bits, group_size, form == "gptq", in_order) if form in ("gptq", "gptq_v2") else None
    if method == "awq" and bits == 4 and str(described.get("version", "gemm")).lower() == "gemm":
        size = group_size if type(group_size) is int else 0
        return awq.awq(size) if described.get("zero_point", True) else None
    if method == "compressed-tensors":
        return _compressed(described)
    return None


def _compressed(described: Mapping[str, Any]) -> Format | None:
    """One way of storing for all quantized layers, nothing sparse, nothing rotated."""
    groups = described.get("config_groups")
    sparse = described.get("sparsity_config") or {}
    if not isinstance(groups, Mapping) or not isinstance(sparse, Mapping) or described.get("transform_config"):
        return None
    if sparse.get("format", "dense") != "dense":
        return None
    found = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    weights = [entry for entry in found if isinstance(entry, Mapping)]
    if not weights or len(weights) < len(found):
        return None
    kinds = {(entry.get("num_bits"), entry.get("type"), str(entry.get("block_structure"))) for entry in weights}
    if len(kinds) != 1:
        return None
    bits, kind, _ = kinds.pop()
    form = described.get("format")
    if form in ("float-quantized", "naive-quantized") and (bits, kind) == (8, "float"):
        return scaled.scaled(_block(weights[0].get("block_structure")))
    if form in ("int-quantized", "naive-quantized") and (bits, kind) == (8, "int"):
        return scaled.scaled(None)
    if form == "nvfp4-pack-quantized" and (bits, kind) == (4, "float"):
        return nvfp4.compressed() if all(entry.get("group_size") == 16 for entry in weights) else None
    if form == "pack-quantized" and bits in (4, 8) and kind == "int":
        return compressed.pack_quantized(bits, all(map(_in_order, weights)))
    return None


def _in_order(weights: Mapping[str, Any]) -> bool:
    """Whether groups are of neighbours, and as int4 has them or larger."""
    size = weights.get("group_size")
    whole = size is None or size == -1
    return weights.get("actorder") in (None, False, "static", "weight") and (
        whole or (type(size) is int and size > 0 and size % GROUP == 0)
    )


def _block(size: Any) -> tuple[int, int] | None:
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(one) is int and one > 0 for one in size):
        return size[0], size[1]
    return None
