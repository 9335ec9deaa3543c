"""Linear layers whose weights are kept in 4 or 8 bits: in int4 (span/int4.py), or by bitsandbytes on an NVIDIA GPU.

Knows bitsandbytes, which is imported only when it is asked for, and the fused experts of mixture models, which int4 alone can take. Does not know models.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from petals_win.errors import UserError
from petals_win.span import int4
from petals_win.span.int4 import FewBits, FewBitsStack
from petals_win.span.linear import linear_weight, replace_children

logger = logging.getLogger(__name__)

Quant = Literal["int4", "nf4", "int8", "none"]
QUANTS: tuple[Quant, ...] = get_args(Quant)

# Of input features; a column with an outlier beyond it is computed in 16 bits (LLM.int8(), Dettmers et al. 2022).
_OUTLIER = 6.0
# Bytes of one weight in NF4: 4 bits, for each 64 weights a scale of 8 bits, for each 256 of these another one of 32.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_INT8_SCALE_BYTES = 4  # for each row of a weight
_WORTH_A_WORD = 2**20  # weights that stay as they are


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
    if quant == "int4":
        if why := int4.why_not(device):
            raise UserError(f"int4 cannot be had here: {why}. Use --quant none{', or nf4' * (device.type == 'cuda')}.")
        return
    if device.type == "cpu":
        # Measured for a step of four of Llama 2 7B's blocks: 39 ms in bfloat16, 462 in nf4, 2,216 in int8.
        instead = "none" if int4.why_not(device) else "int4, or none"
        raise UserError(f"On a CPU {quant} is more than ten times slower than 16 bits. Use --quant {instead}.")
    if device.type != "cuda":
        raise UserError(f"{quant} is for NVIDIA GPUs, not for {device}. Use --quant none.")
    if not is_installed():
        raise UserError(f"{quant} needs bitsandbytes. Run: python -m pip install bitsandbytes, or use --quant none.")


def quantize_linears(
    module: nn.Module,
    quant: Quant,
    device: torch.device,
    dtype: torch.dtype,
    stored: Mapping[str, FewBits | FewBitsStack] | None = None,
) -> None:
    """Replace the linear layers (and GPT-2's Conv1D) below `module`, whose weights are in memory, by quantized ones.

    They compute in `dtype` on `device`. Each plain weight is freed before the next layer is quantized. In int4 the fused experts of
    mixture models are, too, and a layer whose shape it cannot take stays as it is. `stored`: what takes the place of parameters, by
    their names below `module`, since a file has it in few bits; all other weights then stay as they are.
    """
    quantize_loaded(module, quant, device, dtype, stored)
    if quant == "int4" and stored is None:
        say_what_stays(module)


def quantize_loaded(
    module: nn.Module,
    quant: Quant,
    device: torch.device,
    dtype: torch.dtype,
    stored: Mapping[str, FewBits | FewBitsStack] | None = None,
) -> None:
    """As quantize_linears, of what is in memory so far: what is not yet is left for a later call."""
    if quant == "int4":
        _in_int4(module, device, dtype, stored)
        return
    make: Callable[..., nn.Module] = {"nf4": _nf4, "int8": _int8}[quant]

    def quantized(layer: nn.Module) -> nn.Module:
        weight = linear_weight(layer)
        if weight is None or weight.is_meta:
            return layer
        return make(weight.detach().contiguous(), layer.bias, dtype).requires_grad_(False).to(device)

    replace_children(module, quantized)


def say_what_stays(module: nn.Module) -> None:
    """Name the large weights below `module` that int4 has left as they were."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not parameter.is_meta and parameter.numel() >= _WORTH_A_WORD:
            logger.info("%s %s stays in 16 bits: int4 takes no such weight", name, list(parameter.shape))


def extra_bytes(module: nn.Module) -> int:
    """What the quantized layers below `module` keep beside their parameters: the scales of their weights; int4 has all there."""
    states = [getattr(parameter, "quant_state", None) for parameter in module.parameters()]
    sizes = [state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0) for state in states if state]
    scales = [scale for parameter in module.parameters() if (scale := getattr(parameter, "SCB", None)) is not None]
    packed = [part.nbytes for part in module.modules() if isinstance(part, FewBits)]
    return sum(sizes) + sum(scale.nbytes for scale in scales) + sum(packed)


def fused_experts(module: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    """The weights [experts, …] that `module` itself has, by name, and whether each expert's is [in, out] instead of [out, in]."""
    transposed = getattr(module, "is_transposed", None)  # transformers says so of what it can compute in several ways
    if transposed is None or not hasattr(module, "config"):
        return {}
    return {name: (weight, transposed) for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


def kept_bytes(module: nn.Module, quant: Quant) -> dict[str, int]:
    """Of those of a module's own parameters that are quantized: what each then takes. Looks at shapes alone."""
    sizes: dict[str, int] = {}
    weight = linear_weight(module)
    if weight is not None:
        rows, columns = weight.shape
        if quant == "int4":
            if int4.has_place(rows, columns):
                sizes["weight"] = int4.int4_bytes(rows, columns)
        else:
            count = rows * columns
            sizes["weight"] = round(count * _NF4_BYTES) if quant == "nf4" else count + _INT8_SCALE_BYTES * rows
    elif quant == "int4":
        for name, (stack, transposed) in fused_experts(module).items():
            rows, columns = stack.shape[:0:-1] if transposed else stack.shape[1:]
            if int4.has_place(rows, columns):
                sizes[name] = len(stack) * int4.int4_bytes(rows, columns)
    return sizes


def _in_int4(
    module: nn.Module, device: torch.device, dtype: torch.dtype, stored: Mapping[str, FewBits | FewBitsStack] | None
) -> None:
    of: dict[torch.Tensor, Any] = {module.get_parameter(name): kept for name, kept in (stored or {}).items()}

    def quantized(layer: nn.Module) -> nn.Module:
        weight = linear_weight(layer)
        if weight is None or not int4.has_place(*weight.shape):
            return layer
        kept = of.get(weight)
        if kept is None and stored is None and not weight.is_meta:
            kept = int4.Int4Weight(weight, device)
        bias: Any = layer.bias
        return layer if kept is None else int4.few_bits_linear(kept, bias, device, dtype)

    replace_children(module, quantized)
    for part in list(module.modules()):
        for name, (stack, transposed) in fused_experts(part).items():
            kept = of.get(stack)
            if kept is None and stored is None and not stack.is_meta and name in kept_bytes(part, "int4"):
                kept = FewBitsStack(
                    int4.Int4Weight(weight.t() if transposed else weight, device) for weight in stack.detach()
                )
            if kept is not None:
                delattr(part, name)
                setattr(part, name, kept)
                experts: Any = part
                experts.config = copy.copy(experts.config)
                experts.config._experts_implementation = "eager"


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
