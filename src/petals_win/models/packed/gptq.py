"""GPTQ: integers packed along the inputs, a scale and a zero point for each group of inputs and each output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from petals_win.models.four_bits import GROUP, Groups, UnreadGroups
from petals_win.models.packed.format import Format, fits, unpacked, unread

_IN_WORD = 8  # numbers of four bits
Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_WEIGHT, _ZEROS, _SCALES, _GROUP_OF = ".qweight", ".qzeros", ".scales", ".g_idx"


def gptq(bits: int, group_size: int, less_one: bool, in_order: bool) -> Format:
    """`less_one`: zero points are stored less one, as all but the second version of the format do.

    `in_order`: the inputs of a group are neighbours; else they are anywhere, as where those of large activations came first.
    """
    made = functools.partial(_numbers, bits=bits, group_size=group_size, less_one=less_one)
    has_groups = bits == 4 and group_size % GROUP in (0, -1 % GROUP)
    return Format(
        marks=(_WEIGHT,),
        parts=(_WEIGHT, _ZEROS, _SCALES, _GROUP_OF),
        required=(_WEIGHT, _ZEROS, _SCALES),
        plain=lambda parts: _plain(*made(parts)),
        groups=(lambda parts: _unread(parts, made, in_order)) if has_groups else None,
    )


def _numbers(
    parts: Mapping[str, torch.Tensor], bits: int, group_size: int, less_one: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [in, out], zero points and scales [groups, out], and the group of each input."""
    numbers = unpacked(parts[_WEIGHT].T.contiguous(), bits).T
    zeros, scales = unpacked(parts[_ZEROS], bits), parts[_SCALES].float()
    columns, rows = numbers.shape
    fits(
        scales.ndim == 2 and scales.shape[1] == rows and zeros.shape == scales.shape,
        f"it has {rows} outputs, zero points of the shape {list(zeros.shape)} and scales of {list(scales.shape)}",
    )
    size = group_size if group_size > 0 else columns
    group_of = parts[_GROUP_OF].long() if _GROUP_OF in parts else torch.arange(columns) // size
    fits(
        group_of.shape == (columns,) and 0 <= int(group_of.min()) and int(group_of.max()) < len(scales),
        "it names groups of inputs that it has not",
    )
    if less_one:
        # Programs disagree on whether the largest number means the next one or, as it overflows, zero.
        fits(not bool((zeros == 2**bits - 1).any()), "its zero points can be understood in two ways")
        zeros = zeros + 1
    return numbers, zeros, scales, group_of


def _plain(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    return ((numbers - zeros[group_of]) * scales[group_of]).T


def _unread(parts: Mapping[str, torch.Tensor], made: Callable[..., Numbers], in_order: bool) -> UnreadGroups | None:
    fits(parts[_SCALES].ndim == 2 and parts[_WEIGHT].ndim == 2, "its scales or its numbers are no matrix")
    count = parts[_SCALES].shape[1]
    fits(parts[_WEIGHT].shape[1] == count, f"it has {parts[_WEIGHT].shape[1]} outputs, but scales of {count}")
    words = parts[_ZEROS].shape[-1]
    fits(words == -(-count // _IN_WORD), f"it has {count} outputs, but zero points in {words} words")

    def read(start: int, stop: int) -> Groups | None:
        zeros = slice(start // _IN_WORD, -(-stop // _IN_WORD))
        some = {_WEIGHT: parts[_WEIGHT][:, start:stop], _ZEROS: parts[_ZEROS][:, zeros]}
        return _groups(*made({**parts, **some, _SCALES: parts[_SCALES][:, start:stop]}), in_order)

    return unread(count, read)


def _groups(
    numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor, in_order: bool
) -> Groups | None:
    """None if not all groups have as many inputs."""
    neighbours = torch.arange(len(numbers)) // (len(numbers) // len(scales))
    if torch.equal(group_of, neighbours):
        return Groups.of_points(numbers.T, zeros.T, scales.T)
    fits(not in_order, "its inputs are in another order than its config.json says")
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order], neighbours):
        return None
    return Groups.of_points(numbers[order].T, zeros.T, scales.T, order)
