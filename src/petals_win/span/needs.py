"""What serving a block takes, with the memory set aside for its caches, and how many blocks fit into what is free.

Knows sizes, told from a model's configuration alone. Asks for the free memory of a device only to compare. Does not know swarms.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from petals_win.errors import UserError
from petals_win.host.memory import available_bytes
from petals_win.models.architecture import queries_of_a_key, text_config
from petals_win.models.cuts import Cuts
from petals_win.span.footprint import NOTHING, model_footprint
from petals_win.span.kv_int8 import KvCacheDtype
from petals_win.span.quantized_linear import Quant

logger = logging.getLogger(__name__)

_MIB = 2**20

# Of the memory that is free: for activations, and for whoever else uses the PC.
SPARE = 0.1
# Tokens for which a node sets memory aside in each block at least, for all of its sessions together, as long as they fit beside
# the weights. With grouped heads one costs less.
_CACHE_TOKENS, _CACHE_TOKENS_GROUPED = 4096, 16384
# Of the memory that is free once the weights are loaded: what sessions may take in all. Other nodes and programs share the RAM.
_SESSIONS_SHARE_OF_RAM, _SESSIONS_SHARE = 0.25, 0.5
# A node that has room for fewer tokens beside its blocks is of no use.
_FEWEST_TOKENS = 256


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes: each block's weights, its KV cache, and what the PC that asks holds itself."""

    block_bytes: tuple[int, ...]
    cache_bytes_per_token: tuple[int, ...]  # of one sequence, by block
    cache_tokens: int
    outside_bytes: int  # embeddings, final norm, head
    places: tuple[int, ...] | None = None  # where the model may be cut, as in models/cuts.py; None: before each block
    read_bytes: tuple[int, ...] = ()  # of each block's weights, what a token reads: of many experts few
    head_bytes: int = 0  # of what is outside, what a token reads

    @property
    def num_blocks(self) -> int:
        return len(self.block_bytes)

    @property
    def cuts(self) -> Cuts:
        return Cuts(tuple(range(self.num_blocks + 1)) if self.places is None else self.places)

    @property
    def cache_bytes(self) -> int:
        """Set aside for the caches of one block."""
        return self.cache_tokens * max(self.cache_bytes_per_token)

    @property
    def served_block_bytes(self) -> int:
        """Of the largest block, with what is set aside for its caches."""
        return max(self.block_bytes) + self.cache_bytes


def needs_of(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    quant: Quant = "none",
    in_few_bits: Mapping[str, int] = NOTHING,
    kv_cache: KvCacheDtype = "auto",
) -> Needs:
    """Of a model served in `dtype`, its linear layers quantized. Raises UserError for a model that cannot be split.

    `in_few_bits` is what ModelSource says for a device: if there are any, int4 is of these weights alone.
    """
    footprint = model_footprint(config, dtype, quant, in_few_bits, kv_cache)
    return Needs(
        block_bytes=footprint.block_bytes,
        cache_bytes_per_token=footprint.cache_bytes_per_token,
        cache_tokens=least_cache_tokens(config),
        outside_bytes=footprint.outside_bytes,
        places=Cuts.of(config).places,
        read_bytes=footprint.read_bytes,
        head_bytes=footprint.head_bytes,
    )


def least_cache_tokens(config: PreTrainedConfig) -> int:
    """For how many tokens of all sessions together a node sets memory aside at least, if it fits."""
    return _CACHE_TOKENS_GROUPED if queries_of_a_key(text_config(config)) > 1 else _CACHE_TOKENS


def session_budget(free_bytes: int, least_bytes: int, token_bytes: int, device: torch.device) -> int:
    """Bytes for the sessions of a node that has loaded its blocks and has so many bytes free: a bounded share of them.

    `least_bytes` is what it shall be at least, as long as something stays free; `token_bytes` is what a token takes in all of its
    blocks. Raises UserError if that is room for next to nothing.
    """
    share = _SESSIONS_SHARE_OF_RAM if device.type == "cpu" else _SESSIONS_SHARE
    budget = int(min(max(least_bytes, share * free_bytes), (1 - SPARE) * free_bytes))
    if budget < _FEWEST_TOKENS * token_bytes:
        raise UserError(
            f"With its blocks loaded this PC has {free_bytes / _MIB:,.0f} MiB free on {device}, which is no room for conversations. "
            "Serve fewer blocks, or close other programs."
        )
    return budget


def blocks_that_fit(free_bytes: int, needs: Needs) -> int:
    """How many blocks of the model fit, with their caches, into memory of which so many bytes are free, wherever it may be cut."""
    return min(int((1 - SPARE) * free_bytes / needs.served_block_bytes), needs.num_blocks)


def choose_num_blocks(needs: Needs, device: torch.device) -> int:
    """How many blocks fit into what is free on `device` now. Raises UserError if not one does."""
    free = available_bytes(device)
    num_blocks = blocks_that_fit(free, needs)
    if num_blocks < 1:
        raise UserError(
            f"This PC has {free / _MIB:,.0f} MiB free on {device}, but one block with its caches takes "
            f"{needs.served_block_bytes / _MIB:,.0f} MiB: 0 blocks fit. Close other programs, or serve a smaller model."
        )
    if num_blocks < (fewest := needs.cuts.fewest_together):
        raise UserError(
            f"This PC has {free / _MIB:,.0f} MiB free on {device}, which is room for {num_blocks} blocks, but of this model at least "
            f"{fewest} have to stay together. Close other programs, or serve a smaller model."
        )
    logger.info("%d of %d blocks fit into %.0f MiB free on %s", num_blocks, needs.num_blocks, free / _MIB, device)
    return num_blocks


def check_fits(name: str, start: int, end: int, needs: Needs, device: torch.device) -> None:
    """Raise a UserError, which says how many blocks fit, if the weights of the blocks [start, end) exceed the free memory."""
    sizes = needs.block_bytes[start:end]
    free, needed = available_bytes(device), sum(sizes)
    if needed <= free:
        return
    fitting, total = 0, 0
    for size in sizes:
        total += size
        if total > free:
            break
        fitting += 1
    fewer = needs.cuts.run_from(start, fitting)
    advice = f"Serve fewer, such as --blocks {start}:{fewer}" if fewer > start else "Choose a smaller model"
    raise UserError(
        f"The blocks {start}:{end} of {name} take {needed / _MIB:,.0f} MiB, but {free / _MIB:,.0f} MiB are free on {device}: "
        f"{fitting} blocks fit. {advice}, or close other programs."
    )
