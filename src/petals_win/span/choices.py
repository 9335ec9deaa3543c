"""On which device blocks are computed, in which dtype, and quantized how: what the user asks for, or what suits this PC.

Knows torch's devices and what they are good at. Does not know how much memory they have.
"""

from __future__ import annotations

import logging

import torch

from petals_win.errors import UserError
from petals_win.models.source import ModelSource
from petals_win.span import int4
from petals_win.span.footprint import model_bytes
from petals_win.span.quantized_linear import Quant, check_quantizes, is_installed, parse_quant

logger = logging.getLogger(__name__)

# Of a model's weights in 16 bits: so small a one fits a usual card as it is, and would lose more in four bits than a large one does.
SMALL_BYTES = 6 * 2**30
_INT8_FROM = (7, 5)  # the compute capability that bitsandbytes multiplies in 8 bits with
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one. Raises UserError if it does not exist here."""
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"This PC has no device {name!r} that torch can use. Leave --device out, or use cpu.") from e
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def choose_dtype(name: str | None, source: ModelSource, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the checkpoint's: of the two with 16 bits the one that the device computes fast in.

    A CPU is slow with float16, an NVIDIA card of before 2020 (compute capability below 8.0) with bfloat16. A quantized GGUF is
    computed in 16 bits, too, but a small one on a CPU.
    """
    if name is None:
        dtype = source.dtype
        if source.is_quantized_gguf and device.type != "cpu":
            dtype = torch.bfloat16
        if dtype is torch.float16 and device.type == "cpu":
            return torch.bfloat16
        if dtype is torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return torch.float16
        return dtype
    if name not in _DTYPES:
        raise UserError(f"There is no dtype {name!r} to serve in. Use one of: {', '.join(_DTYPES)}.")
    dtype = _DTYPES[name]
    if dtype is torch.float16 and device.type == "cpu":
        raise UserError("A CPU does not compute in float16. Use --dtype bfloat16 or --dtype float32.")
    return dtype


def choose_quant(
    name: str | None, device: torch.device, adapters: bool = False, source: ModelSource | None = None
) -> Quant:
    """The quantization asked for; by default int4 for a model in four bits that it can take over, else what suits the device.

    Raises UserError for one that cannot be had.
    """
    if name is None:
        if source is not None and source.in_few_bits:
            return _as_stored(source, device)
        if device.type != "cuda" or (source is not None and model_bytes(source.config, torch.bfloat16) <= SMALL_BYTES):
            return "none"
        return _of_a_card(device, adapters)
    quant = parse_quant(name)
    check_quantizes(quant, device)
    if adapters and quant not in ("none", "int4"):
        raise UserError("Adapters are for plain weights and int4. Use --quant int4 or none with --adapters.")
    return quant


def _as_stored(source: ModelSource, device: torch.device) -> Quant:
    """Any other four bits would be another rounding on top of the file's."""
    if why := int4.why_not(device):
        logger.info(
            "Serving in 16 bits, though %s is stored in four: int4 cannot be had here, since %s", source.name, why
        )
        return "none"
    logger.info("Serving in int4, since %s is stored in four bits; --quant none is 16 bits or more", source.name)
    return "int4"


def lacks_bitsandbytes(device: torch.device) -> bool:
    """Whether this card could keep weights in 8 bits if that package were installed, and cannot in four."""
    fits = bool(int4.why_not(device)) and torch.cuda.get_device_capability(device) >= _INT8_FROM
    return fits and not is_installed()


def _of_a_card(device: torch.device, adapters: bool) -> Quant:
    """The smallest form that makes texts of large models little more surprising than 16 bits do; README has the figures."""
    if not int4.why_not(device):
        logger.info("Serving in int4; --quant none is 16 bits")
        return "int4"
    if adapters or torch.cuda.get_device_capability(device) < _INT8_FROM:
        return "none"
    if lacks_bitsandbytes(device):
        logger.info("Serving in 16 bits: with bitsandbytes (python -m pip install bitsandbytes) 8 bits would do")
        return "none"
    return "int8"
