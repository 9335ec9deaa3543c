"""Weights that a checkpoint has in few bits already, taken over while blocks are loaded: they are never anything else in memory.

Knows checkpoints and how few bits are kept. Does not know layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from petals_win.errors import UserError
from petals_win.models.eight_bits import scaled_of
from petals_win.models.four_bits import groups_of
from petals_win.models.source import ModelSource
from petals_win.models.transformers_internals import LazyTensor
from petals_win.span.int4 import FewBits, FewBitsStack, Int4Weight, has_place
from petals_win.span.int8 import Int8Weight


class StoredWeights:
    """Those that were taken and not yet given to their block."""

    def __init__(self, source: ModelSource, model: PreTrainedModel, device: torch.device) -> None:
        self._source, self._model, self._device = source, model, device
        self._bits = source.in_few_bits_on(device.type)
        self._taken: dict[str, FewBits | FewBitsStack] = {}

    def take(self, name: str, tensor: LazyTensor) -> bool:
        """Keep the tensor for the parameter `name` if it is one in few bits. Raises UserError if it is of another shape."""
        bits, shape = self._bits.get(name), self._model.get_parameter(name).shape
        if bits is None or not has_place(*shape[-2:]):
            return False
        if bits == 8 and (scaled := scaled_of(tensor)) is not None:
            self._check(name, scaled.shape, shape)
            self._taken[name] = _each(scaled, Int8Weight)
        elif bits == 4 and (groups := groups_of(tensor)) is not None:
            self._check(name, groups.shape, shape)
            self._taken[name] = _each(groups, lambda one: Int4Weight(one, self._device))
        return name in self._taken

    def _check(self, name: str, found: torch.Size, needed: torch.Size) -> None:
        if found != needed:
            raise UserError(
                f"The weights of {self._source.name} do not fit its config.json: {name} has the shape {list(found)} where the "
                f"model needs {list(needed)}. Download the model again, or choose another."
            )

    def give(self, prefix: str) -> Mapping[str, FewBits | FewBitsStack]:
        """Those of parameters whose names begin so, by the rest of their names."""
        names = [name for name in self._taken if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._taken.pop(name) for name in names}


def _each(weight: Any, kept: Callable[[Any], FewBits]) -> FewBits | FewBitsStack:
    """A weight [rows, columns], or those of experts, as a file has it."""
    if len(weight.shape) == 2:
        return kept(weight)
    return FewBitsStack(kept(weight[expert]) for expert in range(weight.shape[0]))
