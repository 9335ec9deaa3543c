"""Tell a block's size and dtype from its config alone, through petals_win.span.

Why: the sizes came from per-architecture block classes that are gone, and a float32 checkpoint was always served in
    bfloat16, which changes its answers.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; it goes with blocks_by_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.block_utils", digest="545a28888250d1bd")

from typing import Optional, Union

import torch
from transformers import PretrainedConfig

from petals.utils.convert_block import QuantType
from petals_win.span.footprint import block_bytes


def resolve_block_dtype(config: PretrainedConfig, dtype: Union[str, torch.dtype, None]) -> torch.dtype:
    """The dtype asked for; for "auto" the checkpoint's own, or float32 if it does not say."""
    if dtype not in ("auto", None):
        return dtype
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def get_block_size(
    config: PretrainedConfig,
    location: str,
    *,
    dtype: Optional[Union[str, torch.dtype]] = None,
    quant_type: QuantType = QuantType.NONE,
) -> int:
    """Bytes of one block, in "memory" with the given dtype or on "disk" with the checkpoint's."""
    if quant_type is not QuantType.NONE:
        raise ValueError(f"Blocks cannot be quantized to {quant_type.name.lower()} yet")
    return block_bytes(config, resolve_block_dtype(config, dtype if location == "memory" else "auto"))
