"""How fast this PC's processor reads weights while it computes with them, which is what a token of any large model costs.

Measured in a second, with the layers and kernels that serve. Knows layers. Does not know models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from petals_win.kernels.library import INT4, Kernels, Linear, kernels
from petals_win.span.int4 import int4_bytes
from petals_win.span.layouts import lay_out
from petals_win.span.native import NativeLinear
from petals_win.span.quantized_linear import Quant

_BYTES = 2**28  # of a weight: much more than a processor keeps near itself
_COLUMNS, _ROWS_AT_ONCE = 8192, 1024
_SECONDS = 0.4  # for each of the two
_ROUNDS = 3  # at least


@torch.inference_mode()
def processor_rates() -> dict[Quant, float]:
    """Bytes of weights per second by how they are kept, for one token: in 16 bits, and in int4 if there are kernels here."""
    rates: dict[Quant, float] = {"none": _in_16_bits()}
    if (library := kernels()) is not None:
        rates["int4"] = _in_int4(library)
    return rates


def _in_16_bits() -> float:
    rows = _BYTES // 2 // _COLUMNS
    layer = nn.Linear(_COLUMNS, rows, bias=False, device="meta")
    weight = torch.full((rows, _COLUMNS), 0.01, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    served = NativeLinear.of(layer) or lay_out(layer)
    inputs = torch.ones(1, _COLUMNS, dtype=torch.bfloat16)
    return weight.nbytes / _seconds(lambda: served(inputs))


def _in_int4(library: Kernels) -> float:
    rows = _ROWS_AT_ONCE * (_BYTES // int4_bytes(_ROWS_AT_ONCE, _COLUMNS))
    # Of any bits, since how long a product takes does not depend on them: these are scales of the size of 1.
    packed = torch.full((int4_bytes(rows, _COLUMNS),), 0x3C, dtype=torch.uint8)
    layer, inputs = Linear(packed.data_ptr(), None, rows, _COLUMNS, INT4), torch.ones(1, _COLUMNS)
    return packed.nbytes / _seconds(lambda: library.linear(layer, inputs))


def _seconds(call: Callable[[], object]) -> float:
    """Of a call: the middle one of some, after a first one that allocates."""
    call()
    times: list[float] = []
    while len(times) < _ROUNDS or sum(times) < _SECONDS:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
