"""How the weights of linear layers lie in memory: of several ways, the one that this processor computes with fastest.

A step of few tokens lasts as long as the reading of the weights, and libraries differ by factors in how they read. Row by row suits
most for one token; column by column, some for a few tokens of small layers (half the time on one of Intel's processors); packed
(span/packed_linear.py), some for large layers, or of 16 bits. So it is tried out, with weights of the layer's own size.
Knows weights. Does not know models.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import linear

from petals_win.host.threads import computing
from petals_win.span.linear import linear_weight, replace_children
from petals_win.span.packed_linear import PackedLinear, can_pack, packed_if_possible

logger = logging.getLogger(__name__)

Layout = Literal["by rows", "by columns", "packed"]
_Layer = Callable[[torch.Tensor], torch.Tensor]

_SEVERAL = 8  # tokens of as many answers, for which a layout should be fast, too
_TURNS = 24
# No larger layer is tried, and so many of one size at least that the processor's nearest memory does not hold them all.
_LONGEST_SIDE, _WEIGHTS, _MOST_LAYERS = 2048, 2**23, 8


def lay_out_linears(modules: Iterable[nn.Module]) -> int:
    """Lay out the linear layers (and GPT-2's Conv1D) below `modules`; returns in the place of how many another module is now.

    Only frozen layers on the CPU are touched. Each weight is freed before the next one is copied.
    """
    return sum(replace_children(module, lay_out) for module in modules)


def lay_out(layer: nn.Module) -> nn.Module:
    """The layer with its weight as it is computed fastest, or the layer itself if it is none of the kind."""
    weight = linear_weight(layer)
    if weight is None or weight.requires_grad or weight.device.type != "cpu":
        return layer
    layout = fastest_layout(weight.shape[0], weight.shape[1], weight.dtype)
    if layout == "packed":
        return packed_if_possible(layer)
    own = _BY[layout](weight)
    if own.stride() != weight.stride():
        layer.weight = nn.Parameter(own if isinstance(layer, nn.Linear) else own.t(), requires_grad=False)
    return layer


def fastest_layout(rows: int, columns: int, dtype: torch.dtype) -> Layout:
    """For weights [rows, columns], by the shortest of many calls in turn, which whatever else the PC does does not lengthen."""
    return _tried(min(rows, _LONGEST_SIDE), min(columns, _LONGEST_SIDE), dtype)


def _by_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous()


def _by_columns(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


_BY: dict[str, _Layer] = {"by rows": _by_rows, "by columns": _by_columns}


@functools.lru_cache
@torch.inference_mode()
def _tried(rows: int, columns: int, dtype: torch.dtype) -> Layout:
    count = max(2, min(_WEIGHTS // (rows * columns), _MOST_LAYERS))
    weights = [torch.ones(rows, columns, dtype=dtype) for _ in range(count)]
    layers: dict[Layout, list[_Layer]] = {
        "by rows": [functools.partial(linear, weight=weight) for weight in weights],
        "by columns": [functools.partial(linear, weight=_by_columns(weight)) for weight in weights],
    }
    # Which of the two is faster does not depend on the number of threads, but how sure that is does: several wait for each other,
    # and with it for other programs.
    with _one_thread():
        found = _fastest(layers, columns, dtype)
    if can_pack(dtype):
        packed: list[_Layer] = [PackedLinear(weight, None) for weight in weights]
        with computing():
            found = _fastest({found: layers[found], "packed": packed}, columns, dtype)
    logger.debug("Weights [%d, %d] of %s lie %s", rows, columns, dtype, found)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fastest(layers: dict[Layout, list[_Layer]], columns: int, dtype: torch.dtype) -> Layout:
    one, several = (torch.ones(1, tokens, columns, dtype=dtype) for tokens in (1, _SEVERAL))
    for_one, for_several = dict.fromkeys(layers, math.inf), dict.fromkeys(layers, math.inf)
    for turn in range(_TURNS):
        for layout, each in layers.items():
            layer = each[turn % len(each)]
            for_one[layout] = min(for_one[layout], seconds_of(layer, one))
            for_several[layout] = min(for_several[layout], seconds_of(layer, several))
    # A factor for one token counts as much as its square for several: most answers have the PC to themselves.
    return min(layers, key=lambda layout: for_one[layout] ** 2 * for_several[layout])


def seconds_of(layer: _Layer, inputs: torch.Tensor) -> float:
    """Of one call."""
    began = time.perf_counter()
    layer(inputs)
    return time.perf_counter() - began
