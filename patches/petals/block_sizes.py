"""Take a block's dtype from its config; its size is petals_win.span's business.

Why: the sizes came from per-architecture block classes that are gone, and a float32 checkpoint was always served in
    bfloat16, which changes its answers.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; it goes with blocks_by_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.block_utils", digest="545a28888250d1bd")

from typing import Union

import torch
from transformers import PretrainedConfig


def resolve_block_dtype(config: PretrainedConfig, dtype: Union[str, torch.dtype, None]) -> torch.dtype:
    """The dtype asked for; for "auto" the checkpoint's own, or float32 if it does not say."""
    if dtype not in ("auto", None):
        return dtype
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
