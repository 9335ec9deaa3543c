"""Which of 16 levels stand for a weight's values, with a scale and a zero for GROUP neighbours of a row.

For cards; on a CPU kernels (petals_quantize in src/kernels/blocks.c) try the same. Does not know how anything is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petals_win.errors import UserError
from petals_win.models.four_bits import GROUP, Groups

# How many steps the range of a group's values may be. Values that lie on levels already do not always use all of them.
_STEPS_BETWEEN = (15, 14, 13)


@dataclass(frozen=True)
class Rounding:
    """Of what a kernel keeps for a group: a scale, and the value of one level."""

    dtype: torch.dtype
    level: int


ON_CPU, ON_CARD = Rounding(torch.float16, 0), Rounding(torch.bfloat16, 8)


def quantize(weight: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, uint8 [rows, columns] of 0 to 15, and scales and zeros, [rows, groups, 2] of the rounding's dtype.

    A value is (level - the rounding's level) * scale + zero. For each group the best of several fits by squares is taken, so what already
    lies on 16 equal steps, as in a file of four bits, stays there. Raises UserError for values beyond what the dtype holds.
    """
    values = weight.detach().float().unflatten(1, (-1, GROUP))
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    # A file with levels on both sides of nothing has its value farthest from nothing at level 0.
    farthest = torch.where(high > -low, high, low)
    tries = [((high - low) / steps, low) for steps in _STEPS_BETWEEN] + [(-farthest / 8, farthest)]
    best: _Fit | None = None
    for scale, start in tries:
        one = _Fit.of(values, rounding, scale, start)
        one = one.better(_Fit.of(values, rounding, *one.by_squares(values)))
        best = one if best is None else best.better(one)
    assert best is not None
    best = best.better(_Fit.of(values, rounding, *best.by_squares(values)))
    check_finite(bool(best.error.isfinite().all()))
    return best.levels.flatten(1).to(torch.uint8), torch.cat([best.scale, best.zero], -1).to(rounding.dtype)


def take_over(groups: Groups, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels of a weight [rows, columns] as they are, with rounded scales, as `quantize` returns them."""
    scales = torch.stack([groups.scale, groups.least + rounding.level * groups.scale], -1).to(rounding.dtype)
    check_finite(bool(scales.isfinite().all()))
    return groups.levels, scales


def check_finite(finite: bool) -> None:
    """Raise a UserError unless a weight is such that four bits stand for it."""
    if not finite:
        raise UserError(
            "The model has weights that four bits cannot stand for: too large, or no numbers. Use --quant none."
        )


@dataclass(frozen=True)
class _Fit:
    """Levels [rows, groups, group], scale and zero [rows, groups, 1] of a weight's groups, and how far off they are."""

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, rounding: Rounding, scale: torch.Tensor, start: torch.Tensor) -> _Fit:
        """With `start` as the value of level 0. Rounded to what is kept before the levels are chosen."""
        dtype, level = rounding.dtype, rounding.level
        scale = scale.to(dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (start + level * scale).to(dtype).float()
        levels = ((values - zero) / scale + level).round_().clamp_(0, 15)
        error = ((levels - level) * scale + zero - values).square_().sum(-1, keepdim=True)
        return cls(levels, scale, zero, error)

    def better(self, other: _Fit) -> _Fit:
        """Of each group the one that is less far off."""
        wins = other.error < self.error
        pairs = zip(
            (self.levels, self.scale, self.zero, self.error),
            (other.levels, other.scale, other.zero, other.error),
            strict=True,
        )
        return _Fit(*(torch.where(wins, new, old) for old, new in pairs))

    def by_squares(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale, and value of level 0, for which these levels are least far off."""
        mean, middle = values.mean(-1, keepdim=True), self.levels.mean(-1, keepdim=True)
        apart = self.levels - middle
        spread = apart.square().sum(-1, keepdim=True)
        scale = (apart * (values - mean)).sum(-1, keepdim=True) / spread.clamp(min=1e-9)
        scale = torch.where(spread == 0, self.scale, scale)
        return scale, mean - middle * scale
