"""A checkpoint whose weights somebody quantized, seen as one of plain weights, each made when it is read.

Knows which tensors make up a weight, by a format's names. Does not know how any format is unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petals_win.errors import UserError
from petals_win.models.checkpoint import SafetensorsCheckpoint
from petals_win.models.four_bits import GROUP, Groups, Unread, UnreadGroups
from petals_win.models.packed.format import Format
from petals_win.models.transformers_internals import LazyTensor

T = TypeVar("T")


class DequantizedCheckpoint:
    """Of a checkpoint in one format; tensors that are plain in it stay as they are."""

    def __init__(self, name: str, checkpoint: SafetensorsCheckpoint, packed: Format) -> None:
        """`name` is the model's, for messages."""
        self._name, self._checkpoint, self._format = name, checkpoint, packed
        self._parts_of: dict[str, list[str]] = {}

    def tensors(self, model: PreTrainedModel) -> dict[str, LazyTensor]:
        """Raises UserError for a weight that lacks some of its parts."""
        stored = self._checkpoint.tensors(model)
        stems = sorted({key.removesuffix(mark) for mark in self._format.marks for key in stored if key.endswith(mark)})
        if stems and any(isinstance(module, Conv1D) for module in model.modules()):
            raise UserError(
                f"The weights of {self._name} are quantized, and those of the type {model.config.model_type} lie the other way round, "
                "which petals-win does not read. Take the model's 16-bit safetensors files instead, or a GGUF file of it."
            )
        found: dict[str, LazyTensor] = {}
        taken: set[str] = set()
        for stem in stems:
            parts = {ending: stem + ending for ending in self._format.parts if stem + ending in stored}
            lacking = [stem + ending for ending in self._format.required if ending not in parts]
            if lacking:
                raise UserError(
                    f"The checkpoint of {self._name} lacks the tensor {lacking[0]}, without which {parts.popitem()[1]} means nothing. "
                    "Download the model again, with all of its files, or choose another."
                )
            key = stem + self._format.result
            found[key] = _Plain(
                self._name, key, self._format, {ending: stored[part] for ending, part in parts.items()}
            )
            self._parts_of[key] = list(parts.values())
            taken.update(parts.values(), (stem + ending for ending in self._format.left_out))
            if key in stored and key not in taken:
                raise UserError(
                    f"The checkpoint of {self._name} has the tensor {key} twice, plain and quantized. "
                    "Download the model again, or choose another."
                )
        return {**{key: tensor for key, tensor in stored.items() if key not in taken}, **found}

    def fetch(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        packed = {part for key in wanted for part in self._parts_of.get(key, ())}
        self._checkpoint.fetch([*(key for key in wanted if key not in self._parts_of), *packed], packed)

    def dtype(self) -> torch.dtype:
        return self._checkpoint.dtype()

    def in_few_bits(self, model: PreTrainedModel) -> Mapping[str, int]:
        """By the configuration, since the names of tensors may have to be downloaded: all linear layers."""
        if self._format.groups is None:
            return {}
        return {
            f"{name}.weight": 4
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module.in_features % GROUP == 0
        }

    def content(self) -> Iterable[bytes]:
        return self._checkpoint.content()


class _Plain:
    """One weight."""

    def __init__(self, model: str, key: str, packed: Format, parts: Mapping[str, LazyTensor]) -> None:
        self._model, self._key, self._format, self._parts = model, key, packed, parts

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._made_by(self._format.plain)[index]

    def groups(self) -> Groups | UnreadGroups | None:
        """The same as levels, if the format has them."""
        found = None if self._format.groups is None else self._made_by(self._format.groups)
        return found.through(self._saying) if isinstance(found, Unread) else found

    def _made_by(self, make: Callable[[Mapping[str, torch.Tensor]], T]) -> T:
        return self._saying(lambda: make({ending: tensor[...] for ending, tensor in self._parts.items()}))

    def _saying(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except ValueError as e:
            raise UserError(
                f"The tensor {self._key} of {self._model} cannot be made plain: {e}. Take the model's 16-bit safetensors files instead, "
                "or a GGUF file of it."
            ) from e
