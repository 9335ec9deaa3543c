"""How many bytes the parts of a model take, told from its configuration alone: no weight is read.

Knows modules on the meta device, and the layout of quantized weights. Does not know checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from petals_win.models.architecture import empty_model, find_blocks, text_config
from petals_win.span.cache import in_int8
from petals_win.span.decoder import CutDecoder
from petals_win.span.int4 import has_place
from petals_win.span.int8 import int8_bytes
from petals_win.span.kv_int8 import KvCacheDtype
from petals_win.span.quantized_linear import QUANTS, Quant, fused_experts, kept_bytes

NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class ModelFootprint:
    """Bytes of weights, by block, and of what is outside of the blocks (embeddings, final norm, head; a tied one once)."""

    block_bytes: tuple[int, ...]
    read_bytes: tuple[int, ...]  # of each block for one token: of its experts only those that a token goes to
    outside_bytes: int
    head_bytes: int  # of the output layer alone, which each token reads
    cache_bytes_per_token: tuple[int, ...]  # of one sequence, by block, with a share of its recurrent states

    @property
    def total_bytes(self) -> int:
        """Of all weights."""
        return sum(self.block_bytes) + self.outside_bytes


def model_footprint(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    quant: Quant = "none",
    in_few_bits: Mapping[str, int] = NOTHING,
    kv_cache: KvCacheDtype = "auto",
) -> ModelFootprint:
    """The footprint of a model whose weights and cache are of `dtype`, the linear layers of its blocks quantized.

    `in_few_bits`: the only weights that int4 is of, some of which it keeps in 8; none: it is of all. Raises UserError for a model that cannot be
    split, or does not keep keys and values as they are asked for.
    """
    key = config.to_json_string(use_diff=False)
    return _footprints(key, _Hidden(config), dtype, frozenset(in_few_bits.items()), kv_cache)[quant]


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
def _footprints(
    _key: str, hidden: _Hidden, dtype: torch.dtype, in_few_bits: frozenset[tuple[str, int]], kv_cache: KvCacheDtype
) -> dict[Quant, ModelFootprint]:
    model = empty_model(hidden.config, dtype)
    layers = find_blocks(model).layers
    plain = sum(parameter.nbytes for parameter in layers.parameters())
    tied = getattr(model, "all_tied_weights_keys", {})  # not yet one and the same parameter on the meta device
    everything = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in tied)
    shapes = CutDecoder(model, 0, len(layers)).kv_shapes(dtype)
    if kv_cache == "int8":
        shapes = in_int8(shapes, text_config(hidden.config).model_type)
    caches = tuple(shape.planned_bytes_per_token for shape in shapes)
    asked = getattr(text_config(hidden.config), "num_experts_per_tok", None)
    chosen = asked if isinstance(asked, int) else None
    bits = dict(in_few_bits)
    others = {
        parameter: _bytes_in(bits.get(name), parameter)
        for name, parameter in model.named_parameters()
        if bits and bits.get(name) != 4
    }
    found: dict[Quant, ModelFootprint] = {}
    for quant in QUANTS:
        known = others if quant == "int4" else dict[nn.Parameter, int]()
        kept, read = zip(*(_of_a_block(layer, quant, known, chosen) for layer in layers), strict=True)
        found[quant] = ModelFootprint(kept, read, everything - plain, _head_bytes(model), caches)
    return found


def _bytes_in(bits: int | None, weight: torch.Tensor) -> int:
    """What a weight takes in so many bits; None: as it is."""
    if bits != 8 or not has_place(*weight.shape[-2:]):
        return weight.nbytes
    *experts, rows, columns = weight.shape
    return math.prod(experts) * int8_bytes(rows, columns)


def _of_a_block(
    block: nn.Module, quant: Quant, known: Mapping[nn.Parameter, int], chosen: int | None
) -> tuple[int, int]:
    """Bytes of its weights, and of those that a token reads, which goes to `chosen` experts; None: to all, for all that is known.

    `known`: bytes of what is not quantized.
    """
    kept = read = 0
    for module in block.modules():
        sizes = {} if quant == "none" else kept_bytes(module, quant)
        experts = fused_experts(module)
        for name, parameter in module.named_parameters(recurse=False):
            size = known.get(parameter, sizes.get(name, parameter.nbytes))
            kept += size
            read += size * min(chosen, len(parameter)) // len(parameter) if chosen and name in experts else size
    return kept, read


def _head_bytes(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else sum(parameter.nbytes for parameter in head.parameters())
