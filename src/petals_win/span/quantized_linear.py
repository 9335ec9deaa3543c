"""Linear layers whose weights are kept in 4 or 8 bits by bitsandbytes, on a GPU or a CPU.

Knows bitsandbytes, which is imported only when it is asked for. Does not know models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from petals_win.errors import UserError
from petals_win.span.linear import linear_weight, replace_children

Quant = Literal["nf4", "int8", "none"]
QUANTS: tuple[Quant, ...] = get_args(Quant)

# Of input features; a column with an outlier beyond it is computed in 16 bits (LLM.int8(), Dettmers et al. 2022).
_OUTLIER = 6.0


def parse_quant(name: str) -> Quant:
    """One of QUANTS by its name. Raises UserError for any other."""
    for quant in QUANTS:
        if quant == name:
            return quant
    raise UserError(f"There is no quantization {name!r}. Use one of: {', '.join(QUANTS)}.")


def is_installed() -> bool:
    """Whether layers can be quantized here."""
    return importlib.util.find_spec("bitsandbytes") is not None


def check_quantizes(quant: Quant, device: torch.device) -> None:
    """Raise a UserError if weights cannot be kept as `quant` on `device`."""
    if quant == "none":
        return
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"{quant} is for NVIDIA GPUs and CPUs, not for {device}. Use --quant none.")
    if not is_installed():
        raise UserError(f"{quant} needs bitsandbytes. Run: python -m pip install bitsandbytes, or use --quant none.")


def quantize_linears(module: nn.Module, quant: Quant, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the linear layers (and GPT-2's Conv1D) below `module`, whose weights are in memory, by quantized ones.

    They compute in `dtype` on `device`. Each plain weight is freed before the next layer is quantized.
    """
    make: Callable[..., nn.Module] = {"nf4": _nf4, "int8": _int8}[quant]

    def quantized(layer: nn.Module) -> nn.Module:
        weight = linear_weight(layer)
        if weight is None or weight.is_meta:
            return layer
        return make(weight.detach().contiguous(), layer.bias, dtype).requires_grad_(False).to(device)

    replace_children(module, quantized)


def extra_bytes(module: nn.Module) -> int:
    """What the quantized layers below `module` keep beside their parameters: the scales of their weights."""
    states = [getattr(parameter, "quant_state", None) for parameter in module.parameters()]
    sizes = [state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0) for state in states if state]
    scales = [scale for parameter in module.parameters() if (scale := getattr(parameter, "SCB", None)) is not None]
    return sum(sizes) + sum(scale.nbytes for scale in scales)


def _bitsandbytes() -> Any:
    import bitsandbytes.nn  # here, since it takes a second to import

    return bitsandbytes.nn


def _nf4(weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer = bnb.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    options: dict[str, Any] = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
    layer.weight = bnb.Params4bit(weight, module=layer, **options)
    layer.bias = bias
    return layer


def _int8(weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer = bnb.Linear8bitLt(
        columns, rows, bias=False, has_fp16_weights=False, threshold=_OUTLIER, device=torch.device("meta")
    )
    layer.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = bias
    return layer
