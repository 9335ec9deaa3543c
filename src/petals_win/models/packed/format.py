"""What a format of quantized weights is to whoever reads one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from petals_win.models.four_bits import Groups, UnreadGroups

ALIGNED = 64  # rows; in any format a word begins with each of its multiples


class CannotUnpack(ValueError):
    """Parts of a weight do not fit each other; the message is a clause for a sentence about the weight."""


@dataclass(frozen=True)
class Format:
    """One weight is several tensors, whose names begin alike and end as `parts` says.

    `plain` gets them by these endings and gives the weight as linear layers have it, [out, in]; it raises CannotUnpack.
    `marks` are the endings of which one at least shows that a weight is in this format, `result` is the ending of the plain
    weight's name. What ends as `left_out` is of use only to whoever computes in eight bits. `groups` gives the same weight as its
    levels, where the format has such, for groups of GROUP inputs or more; None for a weight that has not.
    """

    marks: tuple[str, ...]
    parts: tuple[str, ...]
    required: tuple[str, ...]
    plain: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    result: str = ".weight"
    left_out: tuple[str, ...] = ()
    groups: Callable[[Mapping[str, torch.Tensor]], Groups | UnreadGroups | None] | None = None


def fits(right: bool, clause: str) -> None:
    """Raise CannotUnpack unless `right`."""
    if not right:
        raise CannotUnpack(clause)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Of int32 words [..., n] the unsigned numbers in them [..., n * 32 / bits], those of the lowest bits first."""
    fits(words.dtype == torch.int32, f"its numbers are packed in {words.dtype}, not in words of 32 bits")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def unread(count: int, read: Callable[[int, int], Groups | None]) -> UnreadGroups | None:
    """A weight of `count` rows whose parts are in memory, unpacked when rows are asked for: all at once would take many times of what stays.

    `read` gets the first of neighbours and the one behind the last; the first is a multiple of ALIGNED. None if it has none of the
    first rows.
    """

    def read_surely(rows: np.ndarray) -> Groups:
        found = read(int(rows[0]), int(rows[-1]) + 1)
        assert found is not None  # as of the first rows: groups of inputs are those of all
        return found

    first = read(0, min(count, ALIGNED))
    return first and UnreadGroups(np.arange(count), first.shape[1], read_surely, first.order)
