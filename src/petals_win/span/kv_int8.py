"""Keys and values in 8 bits: how they are packed, and attention that unpacks them a piece at a time.

A head of a token is a row of whole numbers from -127 to 127, each group of which has a scale in 16 bits behind them: 34 bytes for 32
numbers. Knows tensors. Does not know sessions or models.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from petals_win.errors import UserError

KvCacheDtype = Literal["auto", "int8"]  # auto: as the blocks compute

_GROUP, _SCALE_BYTES = 32, 2
_MOST = 127
# Packed bytes of one block of a session that are unpacked as a whole, which torch's own attention is faster with. Of more: scores that are in
# memory at once, and tokens of a piece, whatever the scores.
_AT_ONCE = 2**25
_SCORES, _PIECE_TOKENS = 2**23, (256, 4096)


def parse_kv_cache_dtype(text: str) -> KvCacheDtype:
    """Raises UserError for another one."""
    for known in get_args(KvCacheDtype):
        if text == known:
            return known
    raise UserError(f"Keys and values are kept in auto or int8, not in {text}. Give one of them as --kv-cache-dtype.")


def packed_bytes(size: int) -> int:
    """Of so many numbers."""
    return size + _SCALE_BYTES * -(-size // _GROUP)


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """[..., size] to int8 [..., packed_bytes(size)], to the nearest; what is not finite stays so."""
    size = numbers.shape[-1]
    groups = pad(numbers.float(), (0, -size % _GROUP)).unflatten(-1, (-1, _GROUP))
    scales = (groups.abs().amax(-1) / _MOST).to(torch.bfloat16, memory_format=torch.contiguous_format)
    levels = groups / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    levels = levels.round_().clamp_(-_MOST, _MOST).to(torch.int8).flatten(-2)[..., :size]
    return torch.cat([levels, scales.view(torch.int8)], dim=-1)


def unpacked(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `packed` made of [..., size], in a dtype."""
    size = unpacked_size(rows.shape[-1])
    scales, levels = rows[..., size:].contiguous().view(torch.bfloat16).float(), rows[..., :size]
    if size % _GROUP == 0:
        return (levels.unflatten(-1, (-1, _GROUP)) * scales[..., None]).flatten(-2).to(dtype)
    return (levels * scales.repeat_interleave(_GROUP, dim=-1)[..., :size]).to(dtype)


def unpacked_size(nbytes: int) -> int:
    """How many numbers so many packed bytes are."""
    return nbytes - _SCALE_BYTES * -(-nbytes // (_GROUP + _SCALE_BYTES))


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Scaled dot product attention of [batch, heads, tokens, size] to packed [batch, heads of keys, held, bytes]; [batch, heads, tokens, size].

    `mask` [1, 1, tokens, held] is True where something is seen; None: all of it. No more than a piece of the past is unpacked at once.
    """
    shared, tokens = query.shape[1] // keys.shape[1], query.shape[2]
    # The queries of the heads that share a key stand side by side: keys need not be repeated for them.
    asking = query.unflatten(1, (-1, shared)).flatten(2, 3)
    seen = None if mask is None else mask.repeat(1, 1, shared, 1)
    if keys.numel() + values.numel() <= _AT_ONCE:
        whole = unpacked(keys, query.dtype), unpacked(values, query.dtype)
        output = scaled_dot_product_attention(asking, *whole, attn_mask=seen, scale=scale)
    else:
        factor: float = query.shape[-1] ** -0.5 if scale is None else scale
        output = _attend_to_pieces(asking * factor, keys, values, seen)
    return output.unflatten(2, (shared, tokens)).flatten(1, 2)


def _attend_to_pieces(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """For as many heads of queries, which are scaled, as of keys: by a softmax that is corrected as larger scores come."""
    rows, held = query.shape[:3].numel(), keys.shape[2]
    lowest = torch.finfo(torch.float32).min
    most = query.new_full((*query.shape[:3], 1), lowest, dtype=torch.float32)
    total, sums = torch.zeros_like(most), torch.zeros((), device=query.device)
    fewest, longest = _PIECE_TOKENS
    piece = min(max(_SCORES // rows, fewest), longest)
    for begin in range(0, held, piece):
        end = min(begin + piece, held)
        scores = (query @ unpacked(keys[:, :, begin:end], query.dtype).transpose(2, 3)).float()
        if mask is not None:
            scores.masked_fill_(~mask[..., begin:end], lowest)
        larger = torch.maximum(most, scores.amax(-1, keepdim=True))
        shrink, shares = (most - larger).exp_(), (scores - larger).exp_()
        most, total = larger, total * shrink + shares.sum(-1, keepdim=True)
        sums = sums * shrink + (shares.to(query.dtype) @ unpacked(values[:, :, begin:end], query.dtype)).float()
    return (sums / total).to(query.dtype)
