"""Linear layers whose weight lies in memory the way oneDNN reads it fastest, for steps of few tokens on a CPU.

Knows private operators of torch, which nothing else in this room does; without them, layers stay as they are. Does not know
models, nor where packed layers are faster (span/layouts.py).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from petals_win.span.linear import linear_weight

logger = logging.getLogger(__name__)


def packed_if_possible(layer: nn.Module) -> nn.Module:
    """The layer with its weight packed, or the layer itself if it is none of the kind, or this PC cannot do it."""
    weight = linear_weight(layer)
    if weight is None or weight.requires_grad or weight.device.type != "cpu" or not can_pack(weight.dtype):
        return layer
    bias: Any = layer.bias
    return PackedLinear(weight, bias)


class PackedLinear(nn.Module):
    """Computes what nn.Linear does, from a copy of its weight [out, in] that only oneDNN can read. Frozen."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # Not a parameter: nothing that goes through parameters (moving, counting, saving) can handle this layout.
        self.weight = _pack(weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            return _PackedFunction.apply(inputs, self.weight, self.bias)
        return _multiply(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _PackedFunction(torch.autograd.Function):
    """Only the inputs have a gradient. The weight is unpacked for it, one layer at a time."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return _multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_outputs[0] @ ctx.weight.to_dense(), None, None


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def _multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@functools.lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, they compute what they should, and the processor has the instructions."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight, inputs = torch.eye(16, dtype=dtype) * 2, torch.arange(48, dtype=dtype).view(3, 16)
        packed = _pack(weight)
        works = torch.equal(_multiply(inputs, packed, None), inputs * 2) and torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError, TypeError) as e:
        logger.info("This torch does not pack weights of %s: %s", dtype, e)
        return False
    return works
