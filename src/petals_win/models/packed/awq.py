"""AWQ, the version named gemm: four bits packed along the outputs, eight of them in an order of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from petals_win.models.four_bits import GROUP, Groups, UnreadGroups
from petals_win.models.packed.format import Format, fits, unpacked, unread

_WEIGHT, _ZEROS, _SCALES = ".qweight", ".qzeros", ".scales"
_IN_WORD = 8  # numbers of four bits
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the eight numbers are, counted from its lowest bits


def awq(group_size: int) -> Format:
    parts = (_WEIGHT, _ZEROS, _SCALES)
    groups = _groups if group_size > 0 and group_size % GROUP == 0 else None
    return Format(marks=(_WEIGHT,), parts=parts, required=parts, plain=_plain, groups=groups)


def _plain(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    numbers, zeros, scales = _numbers(parts)
    size = len(numbers) // len(scales)
    return ((numbers - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T.contiguous()


def _groups(parts: Mapping[str, torch.Tensor]) -> UnreadGroups | None:
    words, zeros, scales = (parts[ending].shape for ending in (_WEIGHT, _ZEROS, _SCALES))
    fits(len(words) == len(zeros) == len(scales) == 2, "its numbers or its scales are no matrix")
    rows = words[1] * _IN_WORD
    fits(
        scales[1] == zeros[1] * _IN_WORD == rows,
        f"it has {rows} outputs, zero points for {zeros[1] * _IN_WORD} and scales for {scales[1]}",
    )

    def read(start: int, stop: int) -> Groups:
        packed = slice(start // _IN_WORD, -(-stop // _IN_WORD))
        some = {_WEIGHT: parts[_WEIGHT][:, packed], _ZEROS: parts[_ZEROS][:, packed]}
        numbers, zeros, scales = _numbers({**some, _SCALES: parts[_SCALES][:, start:stop]})
        return Groups.of_points(numbers.T, zeros.T, scales.T)

    return unread(rows, read)


def _numbers(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [in, out], zero points and scales [groups, out]."""
    numbers, zeros, scales = _in_order(parts[_WEIGHT]), _in_order(parts[_ZEROS]), parts[_SCALES].float()
    columns, rows = numbers.shape
    fits(
        zeros.shape == scales.shape and scales.shape[1] == rows and columns % len(scales) == 0,
        f"it has {columns} inputs, {rows} outputs, zero points of the shape {list(zeros.shape)} and scales of {list(scales.shape)}",
    )
    return numbers, zeros, scales


def _in_order(words: torch.Tensor) -> torch.Tensor:
    fits(words.ndim == 2, f"its numbers are packed in the shape {list(words.shape)}")
    return unpacked(words, 4).reshape(len(words), -1, _IN_WORD)[:, :, list(_ORDER)].flatten(1)
