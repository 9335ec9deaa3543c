"""How many bytes the parts of a model take, told from its configuration alone: no weight is read.

Knows modules on the meta device. Does not know checkpoints.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from petals_win.models.architecture import empty_model, find_blocks
from petals_win.span.decoder import CutDecoder


@dataclass(frozen=True)
class ModelFootprint:
    """Bytes of weights, by block, and of what is outside of the blocks (embeddings, final norm, head; a tied one once)."""

    block_bytes: tuple[int, ...]
    outside_bytes: int
    cache_bytes_per_token: tuple[int, ...]  # of one sequence, by block, with a share of its recurrent states

    @property
    def total_bytes(self) -> int:
        """Of all weights."""
        return sum(self.block_bytes) + self.outside_bytes


def model_footprint(config: PreTrainedConfig, dtype: torch.dtype) -> ModelFootprint:
    """The footprint of a model whose weights and cache are of `dtype`. Raises UserError for one that cannot be split."""
    return _footprint(config.to_json_string(use_diff=False), _Hidden(config), dtype)


def block_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of the largest block's weights."""
    return max(model_footprint(config, dtype).block_bytes)


def model_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of all weights of the model."""
    return model_footprint(config, dtype).total_bytes


class _Hidden:
    """A configuration as an argument that plays no part in the key of a cache."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=8)
def _footprint(_key: str, hidden: _Hidden, dtype: torch.dtype) -> ModelFootprint:
    model = empty_model(hidden.config, dtype)
    blocks = find_blocks(model)
    sizes = tuple(sum(parameter.nbytes for parameter in layer.parameters()) for layer in blocks.layers)
    tied = getattr(model, "all_tied_weights_keys", {})  # not yet one and the same parameter on the meta device
    everything = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in tied)
    shapes = CutDecoder(model, 0, len(blocks.layers)).kv_shapes(dtype)
    return ModelFootprint(sizes, everything - sum(sizes), tuple(shape.planned_bytes_per_token for shape in shapes))
