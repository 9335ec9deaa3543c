"""Weights as files of six to eight bits have them: a whole number for each value, times a scale of NEIGHBOURS of a row.

Knows of which types of GGUF files that is true, and how their bytes are read. Does not know what computes with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from petals_win.models.four_bits import Unread

NEIGHBOURS = 16


@dataclass(frozen=True)
class Scaled:
    """A weight [rows, columns]."""

    levels: torch.Tensor  # int8 [rows, columns]
    scale: torch.Tensor  # float32 [rows, columns / NEIGHBOURS]

    def __post_init__(self) -> None:
        if self.levels.shape[-1] != NEIGHBOURS * self.scale.shape[-1]:
            raise ValueError(f"its scales are none of {NEIGHBOURS} inputs")

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    def __getitem__(self, index: slice) -> Scaled:
        """Some of the rows."""
        return Scaled(self.levels[index], self.scale[index])


def scaled_of(tensor: object) -> Unread[Scaled] | None:
    """What a tensor of a checkpoint is in eight bits; None: it is in another form."""
    scaled = getattr(tensor, "scaled", None)
    return None if scaled is None else scaled()


# Levels [blocks, values] and scales [blocks, values / NEIGHBOURS], of blocks of bytes.
Unpacked = tuple[np.ndarray, np.ndarray]


def _q8_0(data: np.ndarray) -> Unpacked:
    levels, scale = data[:, 2:].view(np.int8), _halves(data[:, :2])
    return levels, np.repeat(scale, levels.shape[1] // NEIGHBOURS, axis=1)


def _q6_k(data: np.ndarray) -> Unpacked:
    """For each half of the values: four lower bits of two quarters in the halves of a byte, and two upper bits of each quarter in one."""
    low, high = data[:, :128].reshape(-1, 2, 1, 64), data[:, 128:192].reshape(-1, 2, 1, 32)
    lower = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    upper = high >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1) & 3
    levels = (lower | upper << 4).reshape(len(data), -1).view(np.int8) - np.int8(32)
    return levels, _halves(data[:, 208:]) * data[:, 192:208].view(np.int8)


def _halves(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


GGUF_TYPES: dict[GGMLQuantizationType, Callable[[np.ndarray], Unpacked]] = {
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q6_K: _q6_k,
}
