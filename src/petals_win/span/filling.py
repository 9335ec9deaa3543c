"""Blocks while their weights are read: each large one is quantized or laid out as soon as it is in memory, before the next is read.

So little more is in memory than what stays. Knows checkpoints, and how layers are kept. Does not know what computes with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_win.host.memory import trim_heap
from petals_win.host.threads import look_around
from petals_win.models.architecture import find_blocks
from petals_win.models.loading import load_parts
from petals_win.models.source import ModelSource
from petals_win.span import native
from petals_win.span.layouts import lay_out_linears
from petals_win.span.linear import linear_weight
from petals_win.span.quantized_linear import Quant, extra_bytes, fused_experts, quantize_loaded, say_what_stays
from petals_win.span.stored import StoredWeights

logger = logging.getLogger(__name__)

_LARGE = 2**20  # weights of a layer that is read by itself
_SAY_EVERY_S = 10.0


class Filling:
    """The blocks [start, end) of `model`, whose parameters are on the meta device."""

    def __init__(
        self,
        source: ModelSource,
        model: PreTrainedModel,
        start: int,
        end: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quant: Quant,
        stay_plain: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """stay_plain: layers that are not quantized stay as they are. `progress` gets the number of blocks loaded so far and of all."""
        blocks = find_blocks(model)
        self._source, self._model, self._start, self._prefix = source, model, start, blocks.prefix
        self._layers = list(blocks.layers)[start:end]
        self._dtype, self._device, self._progress = dtype, device, progress
        self._quant: Quant = quant
        self._model_type = blocks.decoder.config.model_type
        self._may_lay_out = not stay_plain and device.type == "cpu"
        # Told before anything is read. Of quantized blocks it depends on what their files have.
        self._lays_out = [self._may_lay_out and quant == "none" and not self._suits(layer) for layer in self._layers]
        self._stored = StoredWeights(source, model, device) if quant == "int4" and source.in_few_bits else None
        self._said = time.perf_counter()
        # Counted while they are parameters, which those that have been laid out are no more.
        self.weight_bytes = sum(map(_bytes_of, self._layers)) if quant == "none" else 0

    def load(self) -> None:
        """Read the weights. Raises UserError as load_parts does."""
        parts = [
            (number, wanted)
            for number, layer in enumerate(self._layers)
            for wanted in _parts_of(layer, self._name_of(number))
        ]

        def settle(done: int, _of: int) -> None:
            number = parts[done - 1][0]
            self._settle(number)
            if done == len(parts) or parts[done][0] > number:
                self._complete(number)
            look_around()

        load_parts(
            self._source,
            self._model,
            [wanted for _, wanted in parts],
            dtype=self._dtype,
            # Quantizing on the way keeps the plain weights out of a GPU's memory.
            device=self._device if self._quant == "none" else torch.device("cpu"),
            progress=settle,
            take=self._stored and self._stored.take,
        )

    def _settle(self, number: int) -> None:
        """What has been read of a block."""
        layer = self._layers[number]
        if self._quant != "none":
            below = self._stored and self._stored.give(self._name_of(number))
            quantize_loaded(layer, self._quant, self._device, self._dtype, below)
        elif self._lays_out[number]:
            lay_out_linears([layer])

    def _complete(self, number: int) -> None:
        layer = self._layers[number]
        if self._quant != "none":
            self.weight_bytes += _bytes_of(layer)
            if self._may_lay_out and not self._suits(layer):
                lay_out_linears([layer])
        if self._quant == "int4" and self._stored is None:
            say_what_stays(layer)
        trim_heap()
        self._tell(number + 1)

    def _tell(self, done: int) -> None:
        count, now = len(self._layers), time.perf_counter()
        if self._progress is not None:
            self._progress(done, count)
        if now >= self._said + _SAY_EVERY_S and done < count:
            where = f"{self._start}:{self._start + count} of {self._source.name}"
            logger.info("Loading the blocks %s: %d of %d are loaded", where, done, count)
            self._said = now

    def _suits(self, layer: nn.Module) -> bool:
        return native.suits(layer, self._model_type, self._dtype, self._device)

    def _name_of(self, number: int) -> str:
        return f"{self._prefix}{self._start + number}."


def _bytes_of(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters()) + extra_bytes(layer)


def _parts_of(block: nn.Module, prefix: str) -> Sequence[Callable[[str], bool]]:
    """What of a block is read at once, by names: each large layer, and experts' weights, by themselves, and the rest."""
    alone = [
        f"{prefix}{name}."
        for name, module in block.named_modules()
        if (weight := linear_weight(module)) is not None and weight.numel() >= _LARGE
    ]
    alone += [f"{prefix}{name}.{one}" for name, module in block.named_modules() for one in fused_experts(module)]
    names = tuple(alone)

    def one_of(name: str) -> Callable[[str], bool]:
        return lambda parameter: parameter.startswith(name)

    return [
        *map(one_of, names),
        lambda parameter: parameter.startswith(prefix) and not parameter.startswith(names),
    ]
