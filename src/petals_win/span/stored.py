"""Weights that a checkpoint has in four bits already, taken over while blocks are loaded: they are never anything else in memory.

Knows checkpoints and how int4 keeps weights. Does not know layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from petals_win.errors import UserError
from petals_win.models.four_bits import groups_of
from petals_win.models.source import ModelSource
from petals_win.models.transformers_internals import LazyTensor
from petals_win.span.int4 import Int4Stack, Int4Weight, has_place, taken_over


class StoredWeights:
    """Those that were taken and not yet given to their block."""

    def __init__(self, source: ModelSource, model: PreTrainedModel, device: torch.device) -> None:
        self._source, self._model, self._device = source, model, device
        self._taken: dict[str, Int4Weight | Int4Stack] = {}

    def take(self, name: str, tensor: LazyTensor) -> bool:
        """Keep the tensor for the parameter `name` if it is one in four bits. Raises UserError if it is of another shape."""
        if name not in self._source.in_four_bits:
            return False
        shape = self._model.get_parameter(name).shape
        groups = groups_of(tensor) if has_place(*shape[-2:]) else None
        if groups is None:
            return False
        if groups.shape != shape:
            raise UserError(
                f"The weights of {self._source.name} do not fit its config.json: {name} has the shape {list(groups.shape)} where the "
                f"model needs {list(shape)}. Download the model again, or choose another."
            )
        self._taken[name] = taken_over(groups, self._device)
        return True

    def give(self, prefix: str) -> Mapping[str, Int4Weight | Int4Stack]:
        """Those of parameters whose names begin so, by the rest of their names."""
        names = [name for name in self._taken if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._taken.pop(name) for name in names}
