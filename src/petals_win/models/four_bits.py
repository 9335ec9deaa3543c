"""Weights as files of four bits have them: 16 equal steps for each GROUP neighbours of a row, as int4 has them, too.

Knows of which types of GGUF files that is true, and how their bytes are read. Does not know what computes with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

from petals_win.models.architecture import find_blocks

GROUP = 32
_Kept = TypeVar("_Kept")


@dataclass(frozen=True)
class Groups:
    """A weight [..., rows, columns]: a value is its level times its group's scale, plus its group's least value."""

    levels: torch.Tensor  # uint8 [..., rows, columns], 0 to 15
    scale: torch.Tensor  # float32 [..., rows, columns / GROUP], as is
    least: torch.Tensor
    order: torch.Tensor | None = None  # int64 [columns]: which input each column is multiplied by; None: as they are

    def __post_init__(self) -> None:
        if not self.levels.shape[-1] == GROUP * self.scale.shape[-1] == GROUP * self.least.shape[-1]:
            raise ValueError(f"its groups are none of {GROUP} inputs")

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    def __getitem__(self, index: int | slice) -> Groups:
        """Some of the rows, or one expert of several."""
        return Groups(self.levels[index], self.scale[index], self.least[index], self.order)

    @classmethod
    def of_points(
        cls, levels: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, order: torch.Tensor | None = None
    ) -> Groups:
        """Of levels [rows, columns], and of each larger group a scale and the level that means nothing, [rows, groups]."""
        times = levels.shape[1] // (scale.shape[1] * GROUP)
        scale = scale.float()
        least = -zeros * scale
        parts = (levels.to(torch.uint8), scale.repeat_interleave(times, 1), least.repeat_interleave(times, 1))
        return cls(*parts, order)


class Unread(Generic[_Kept]):
    """A weight [..., rows, columns] that is read when rows are asked for, so that it is never in memory as a whole."""

    def __init__(
        self,
        rows: np.ndarray,
        columns: int,
        read: Callable[[np.ndarray], _Kept],
        order: torch.Tensor | None = None,
    ) -> None:
        """`rows` [..., rows] is by which number `read` knows each row; it takes some of the numbers, [rows]. `order`: as of Groups."""
        self._rows, self._columns, self._read, self.order = rows, columns, read, order

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._rows.shape, self._columns))

    @overload
    def __getitem__(self, index: int) -> Unread[_Kept]: ...
    @overload
    def __getitem__(self, index: slice) -> _Kept: ...
    def __getitem__(self, index: int | slice) -> Unread[_Kept] | _Kept:
        """One expert of several; or some rows of a weight [rows, columns]."""
        if isinstance(index, slice):
            return self._read(self._rows[index])
        return Unread(self._rows[index], self._columns, self._read, self.order)

    def through(self, way: Callable[[Callable[[], _Kept]], _Kept]) -> Unread[_Kept]:
        """The same, but each reading is called by `way`."""
        read = self._read
        return Unread(self._rows, self._columns, lambda rows: way(lambda: read(rows)), self.order)


UnreadGroups = Unread[Groups]


def groups_of(tensor: object) -> Groups | UnreadGroups | None:
    """What a tensor of a checkpoint is in four bits; None: it is plain, or in another form."""
    groups = getattr(tensor, "groups", None)
    return None if groups is None else groups()


# Levels [blocks, values], and scales and least values [blocks, groups], of blocks of bytes.
Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray]


def _q4_0(data: np.ndarray) -> Unpacked:
    scale = _halves(data, 0)
    return _nibbles(data[:, 2:]), scale, -8 * scale


def _q4_1(data: np.ndarray) -> Unpacked:
    return _nibbles(data[:, 4:]), _halves(data, 0), _halves(data, 2)


def _q4_k(data: np.ndarray) -> Unpacked:
    """Eight groups share a scale of scales and one of least values, which have six bits for each group: four, and two elsewhere."""
    packed = data[:, 4:16]
    scales, leasts, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    factors = np.concatenate([scales & 63, rest & 15 | scales >> 6 << 4], axis=1)
    lows = np.concatenate([leasts & 63, rest >> 4 | leasts >> 6 << 4], axis=1)
    levels = _nibbles(data[:, 16:].reshape(-1, GROUP)).reshape(len(data), -1)
    return levels, _halves(data, 0) * factors, -_halves(data, 2) * lows


def _nibbles(data: np.ndarray) -> np.ndarray:
    """The lower halves of a row's bytes, and behind them the upper ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _halves(data: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(data[:, start : start + 2]).view(np.float16).astype(np.float32)


GGUF_TYPES: dict[GGMLQuantizationType, Callable[[np.ndarray], Unpacked]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
}


def if_most_in_four(model: PreTrainedModel, bits: Mapping[str, int]) -> Mapping[str, int]:
    """Those of weights in blocks; none if those in 4 bits are not most of what the blocks have."""
    prefix = find_blocks(model).prefix
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.ndim > 1
    }
    found = {name: bits[name] for name in weights if name in bits}
    in_four = sum(weights[name].numel() for name, kept in found.items() if kept == 4)
    return found if 2 * in_four > sum(weight.numel() for weight in weights.values()) else {}
