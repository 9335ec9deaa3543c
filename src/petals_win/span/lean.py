"""Blocks of the plain kind, as Llama's and Qwen's are, computed in a third of the operations that transformers' code takes.

A step of few tokens spends as much time between operations as in them: each is looked up, checked and started anew, by code that the
weights have driven out of the processor's caches meanwhile, and a GPU waits for it. Knows what such blocks compute. Does not know caches, nor
whether the result may be trusted: span/joint.py tries that out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm
from transformers.activations import SiLUActivation

from petals_win.host.memory import trim_heap
from petals_win.host.threads import look_around
from petals_win.span.decoder import CutDecoder
from petals_win.span.linear import linear_weight

# Types of models whose blocks compute what is written here, whatever the values are; others may do so for small ones only.
_PLAIN = {"llama", "ministral", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
_NAMES_OF_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_NAMES_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NAMES_OF_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_Layer = Callable[[torch.Tensor], torch.Tensor]


class Attention(Protocol):
    """Attention over what sessions hold, and what they hold by now."""

    def __call__(
        self, module: nn.Module, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Of new rows [rows, heads, size] of the block `index`, whose attention is `module`: [rows, all heads x size]."""
        ...


class LeanBlocks:
    """The blocks of a decoder, all of the plain kind. Weights are the decoder's own."""

    def __init__(self, decoder: CutDecoder, rotary: nn.Module, join: bool) -> None:
        self._start = decoder.start
        self._rotary = rotary
        self._blocks: list[_LeanBlock] = []
        for number, layer in enumerate(decoder.layers):
            self._blocks.append(_LeanBlock(decoder.start + number, layer, join))
            if join:
                trim_heap()  # of the weights that are parts of larger ones now

    @classmethod
    def of(cls, decoder: CutDecoder, join: bool = True) -> LeanBlocks | None:
        """None: the blocks are of another kind. join: let weights that read the same become parts of one, which few rows gain by, else each
        layer computes as it does by itself."""
        rotary = decoder.part("rotary_emb")
        model_type = decoder.config.model_type
        if rotary is None or not all(is_plain(layer, model_type) for layer in decoder.layers):
            return None
        return cls(decoder, rotary, join)

    def run(
        self, hidden: torch.Tensor, start: int, end: int, position_ids: torch.Tensor, attend: Attention
    ) -> torch.Tensor:
        """Hidden states [rows, hidden] at these positions [1, rows] through the blocks [start, end); returns the same shape."""
        cos, sin = self._rotary(hidden, position_ids)
        half = cos.shape[-1] // 2
        turn = cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)
        for block in self._blocks[start - self._start : end - self._start]:
            look_around()
            hidden = block(hidden, turn, attend)
        return hidden


class _LeanBlock:
    def __init__(self, index: int, block: Any, join: bool) -> None:
        attention: Any = block.self_attn
        self._index, self._attention = index, attention
        self._size: int = attention.head_dim
        self._turns = bool(getattr(attention, "use_rope", True))
        self._norm, self._norm_of_mlp = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self._project = _side_by_side(projections, join)
        self._heads = [module.out_features // self._size for module in projections]
        names = ("q_norm", "k_norm")
        self._head_norms = (
            [_norm(getattr(attention, name)) for name in names] if hasattr(attention, "q_norm") else None
        )
        self._add_attention = _adding(attention.o_proj, join)
        self._add_mlp = _adding_mlp(block.mlp, join)

    def __call__(
        self, hidden: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], attend: Attention
    ) -> torch.Tensor:
        queries, keys, values = self._heads
        states = self._project(self._norm(hidden)).view(len(hidden), -1, self._size)
        value = states.narrow(1, queries + keys, values)
        if self._head_norms is None:
            asked = states.narrow(1, 0, queries + keys)
        else:
            query, key = states.narrow(1, 0, queries), states.narrow(1, queries, keys)
            asked = torch.cat([self._head_norms[0](query), self._head_norms[1](key)], dim=1)
        if self._turns:
            asked = _turned(asked, *turn)
        query, key = asked.narrow(1, 0, queries), asked.narrow(1, queries, keys)
        hidden = self._add_attention(hidden, attend(self._attention, self._index, query, key, value))
        return self._add_mlp(hidden, self._norm_of_mlp(hidden))


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [rows, heads, size], whose first half of a head is turned with its second; the sines of that half are negative."""
    turning = cos.shape[-1]
    if turning < heads.shape[-1]:
        return torch.cat([_turned(heads[..., :turning], cos, sin), heads[..., turning:]], dim=-1)
    return torch.addcmul(heads * cos, heads.roll(turning // 2, -1), sin)


def _side_by_side(modules: Sequence[Any], join: bool) -> _Layer:
    """The outputs of linear layers, one behind the other in the last dimension. Their weights become parts of one if they may."""
    found = [linear_weight(module) for module in modules]
    weights = [weight for weight in found if weight is not None and not weight.requires_grad]
    if not join or len(weights) < len(found) or len({module.bias is None for module in modules}) > 1:
        return lambda inputs: torch.cat([module(inputs) for module in modules], dim=-1)
    sizes = [module.out_features for module in modules]
    by_columns = weights[0].stride(0) == 1
    weight = torch.cat([weight.t() for weight in weights], dim=1).t() if by_columns else torch.cat(weights)
    for module, part in zip(modules, weight.split(sizes), strict=True):
        module.weight = nn.Parameter(part, requires_grad=False)
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    return lambda inputs: linear(inputs, weight, bias)


def _adding(module: Any, join: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of hidden states and a linear layer's inputs, which adds its outputs; in one operation with `join`."""
    weight = linear_weight(module)
    if weight is None or module.bias is not None or not join:
        return lambda hidden, inputs: hidden + module(inputs)
    transposed = weight.t()
    return lambda hidden, inputs: torch.addmm(hidden, inputs, transposed)


def _norm(module: Any) -> _Layer:
    weight: torch.Tensor = module.weight
    eps: float = module.variance_epsilon
    shape = list(weight.shape)
    if weight.device.type != "cpu":
        return lambda inputs: rms_norm(inputs, shape, weight, eps)
    # On a CPU that is seven operations; these are four.
    scaled, least = weight.float() * math.sqrt(len(weight)), torch.tensor(math.sqrt(len(weight) * eps))

    def norm(inputs: torch.Tensor) -> torch.Tensor:
        inputs32 = inputs.float()
        length = torch.linalg.vector_norm(inputs32, dim=-1, keepdim=True)
        return (inputs32 * scaled).div_(torch.hypot(length, least)).to(inputs.dtype)

    return norm


def _adding_mlp(module: Any, join: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if not _is_gated(module):
        # Experts, of which each row chooses some.
        return lambda hidden, inputs: hidden + _first(module(inputs[None]))[0]
    gate_and_up, down = _side_by_side([module.gate_proj, module.up_proj], join), _adding(module.down_proj, join)
    activate, size = module.act_fn, module.gate_proj.out_features

    def add(hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        both = gate_and_up(inputs)
        return down(hidden, activate(both.narrow(-1, 0, size)).mul_(both.narrow(-1, size, size)))

    return add


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def is_plain(block: nn.Module, model_type: str) -> bool:
    """Whether the block of a model computes what is written here, if it computes as its parts say."""
    attention: Any = getattr(block, "self_attn", None)
    if model_type not in _PLAIN or {name for name, _ in block.named_children()} != _NAMES_OF_BLOCK:
        return False
    if not isinstance(attention, nn.Module):
        return False
    of_attention = {name for name, _ in attention.named_children()}
    return of_attention in (_NAMES_OF_ATTENTION, _NAMES_OF_ATTENTION | {"q_norm", "k_norm"})


def is_dense(block: Any) -> bool:
    """Whether a plain block has no experts, and activates by SiLU."""
    return _is_gated(block.mlp) and isinstance(block.mlp.act_fn, SiLUActivation)


def _is_gated(mlp: nn.Module) -> bool:
    return {name for name, _ in mlp.named_children()} == _NAMES_OF_MLP
