"""Weights in groups of four bits, which torch's own kernels multiply with, on a CPU or an NVIDIA card.

A group is GROUP neighbours of a row: 16 levels between a scale and a zero of its own, both in bfloat16. Knows private operators of
torch and the order in which the one for CPUs packs a weight, which is found out by trying. Does not know models.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petals_win.host.threads import computing

logger = logging.getLogger(__name__)

GROUP = 32
_UNIT = 64  # rows; weights are padded to a multiple, so that no kernel has a rest, which is packed in another order
_FEWEST_ROWS = 64  # a smaller layer takes next to nothing, and more with its padding
_MIDDLE = 8  # the level that is the zero, in torch's kernels
_PIECE = 2**18  # weights that are quantized or unpacked at once: what the nearest memory holds
_TRIED_ROWS = 16
_TRIED_SHAPE = (2048, 2048)
_SLOWEST = 3.0  # times of 16 bits, whose weights lie in a cache here; between what good and bad kernels take
_STEPS_BETWEEN = (15, 14, 13)  # levels that a group's values may span; files of four bits do not always use all

_packed = torch.ops.aten


def has_place(rows: int, columns: int) -> bool:
    """Whether a weight [rows, columns] can be kept in four bits and is worth it."""
    return rows >= _FEWEST_ROWS and columns % GROUP == 0


def int4_bytes(rows: int, columns: int) -> int:
    """What a weight takes for which there is a place: half a byte for each value, and four for each group."""
    return _padded(rows) * columns // 2 + 4 * _padded(rows) * (columns // GROUP)


def why_not(device: torch.device) -> str:
    """Why weights cannot be multiplied in four bits on `device`; "" if they can."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"this card has the compute capability {major}.{minor}, and 8.0 is needed"
    if device.type != "cpu":
        return f"it is for NVIDIA cards and CPUs, not for {device}"
    if _order() is None:
        return "this torch has no such kernel for CPUs"
    slower = times_of_16_bits()
    # Measured: 1.1 where torch's kernel uses the processor's vectors (0.4 for large layers), 10 where it was built without, as for Windows.
    return (
        "" if slower < _SLOWEST else f"this torch takes {slower:.1f} times as long with it as with 16 bits on this CPU"
    )


def quantize(weight: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, uint8 [rows, columns] of 0 to 15, and scales and zeros, float32 [rows, groups, 2] rounded to bfloat16.

    A value is (level - 8) * scale + zero. For each group the best of several fits by squares is taken, so what already lies on 16
    equal steps, as in a file of four bits, stays there.
    """
    values = weight.detach().float().unflatten(1, (-1, group))
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    # A file with levels on both sides of nothing has its value farthest from nothing at level 0.
    farthest = torch.where(high > -low, high, low)
    tries = [((high - low) / steps, low) for steps in _STEPS_BETWEEN] + [(-farthest / _MIDDLE, farthest)]
    best = _Fit.of(values, *tries[0])
    for scale, start in tries[1:]:
        best = best.better(_Fit.of(values, scale, start))
    for _ in range(2):
        best = best.better(_Fit.of(values, *best.by_squares(values)))
    return best.levels.flatten(1).to(torch.uint8), torch.cat([best.scale, best.zero], -1)


@dataclass(frozen=True)
class _Fit:
    """Levels [rows, groups, group], scale and zero [rows, groups, 1] of a weight's groups, and how far off they are."""

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, scale: torch.Tensor, start: torch.Tensor) -> _Fit:
        """With `start` as the value of level 0. Rounded to what is kept before the levels are chosen."""
        scale = torch.where(scale == 0, 1.0, scale).bfloat16().float()
        zero = (start + _MIDDLE * scale).bfloat16().float()
        levels = ((values - zero) / scale + _MIDDLE).round_().clamp_(0, 15)
        error = ((levels - _MIDDLE) * scale + zero - values).square_().sum(-1, keepdim=True)
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


class Int4Weight(nn.Module):
    """A weight [rows, columns] in four bits. Stands for it in linear() and @, so that code that computes with it stays as it is."""

    packed: torch.Tensor
    scales: torch.Tensor  # and zeros, bfloat16 [groups, padded rows, 2]

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        """`weight` is one that has a place; piece by piece it is quantized, on the CPU, and packed on `device`."""
        super().__init__()
        self.rows, self.columns = weight.shape
        pack = _pack_for_cpu if device.type == "cpu" else functools.partial(_pack_on_card, device=device)
        pieces = [_quantized(weight, rows) for rows in _pieces(_padded(self.rows), self.columns)]
        self.register_buffer("packed", torch.cat([pack(levels) for levels, _ in pieces]), persistent=False)
        self.register_buffer("scales", torch.cat([scales for _, scales in pieces], 1).to(device), persistent=False)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] to [..., rows], of the same dtype."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            return _Int4Function.apply(inputs, self)
        flat = inputs.reshape(-1, self.columns).to(torch.bfloat16).contiguous()
        return self._product(flat)[:, : self.rows].to(inputs.dtype).unflatten(0, inputs.shape[:-1])

    def columns_of(self, rows: range) -> torch.Tensor:
        """The unpacked values of these rows, each of which is a column of the result: bfloat16 [columns, rows]. CPU only.

        `rows` begins and ends at a multiple of 64.
        """
        order = _order()
        assert order is not None
        taken = self.packed.view(-1, self.columns, order.block // 2)
        taken = taken[rows.start // order.block : rows.stop // order.block]
        levels = torch.stack((taken & 15, taken >> 4), order.dim).view(-1, self.columns, order.block)
        # Apart from one another, or they would be read number by number.
        scales, zeros = (
            self.scales[:, rows.start : rows.stop].permute(2, 0, 1).contiguous().unflatten(2, (-1, order.block))
        )
        levels = (levels.view(torch.int8) - _MIDDLE).transpose(0, 1)
        values = levels.to(torch.bfloat16, memory_format=torch.contiguous_format).view(-1, GROUP, *scales.shape[1:])
        torch.addcmul(zeros.unsqueeze(1), values, scales.unsqueeze(1), out=values)
        return values.view(self.columns, len(rows))

    def dequantized(self) -> torch.Tensor:
        """The values that stand for the weight, bfloat16 [rows, columns]."""
        if self.packed.device.type == "cpu":
            parts = [self.columns_of(rows) for rows in _pieces(_padded(self.rows), self.columns)]
            return torch.cat(parts, 1).t()[: self.rows]
        unit = torch.eye(self.columns, dtype=torch.bfloat16, device=self.packed.device)
        return self._product(unit).t()[: self.rows]

    def _product(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.packed.device.type != "cpu":
            return _packed._weight_int4pack_mm(inputs, self.packed, GROUP, self.scales)
        if len(inputs) <= few_rows():
            return _packed._weight_int4pack_mm_for_cpu(inputs, self.packed, GROUP, self.scales)
        return self._unpacked_product(inputs)

    def _unpacked_product(self, inputs: torch.Tensor) -> torch.Tensor:
        output = inputs.new_empty(len(inputs), self.scales.shape[1])
        for rows in _pieces(self.scales.shape[1], self.columns):
            torch.mm(inputs, self.columns_of(rows), out=output[:, rows.start : rows.stop])
        return output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _MULTIPLYING and len(args) >= 2 and isinstance(args[1], cls) and not kwargs:
            result = args[1].multiply(args[0])
            return result if len(args) < 3 or args[2] is None else result + args[2]
        raise TypeError(f"A weight in four bits cannot be used by {func}")

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}"


_MULTIPLYING = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Int4Linear(nn.Linear):
    """Computes what nn.Linear does. Frozen. A subclass, so that peft adds to it what it adds to one."""

    def __init__(
        self, weight: torch.Tensor, bias: nn.Parameter | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        # Tells whoever asks the layer where and in what it computes.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.bias = bias
        self.int4 = Int4Weight(weight, device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as in nn.Linear
        """[..., in] to [..., out]."""
        output = self.int4.multiply(input)
        return output if self.bias is None else output + self.bias


class Int4Stack(nn.Module):
    """In the place of a tensor of weights [experts, …]: each of them by its number."""

    def __init__(self, weights: torch.Tensor, transposed: bool, device: torch.device) -> None:
        super().__init__()
        each = (weight.t() if transposed else weight for weight in weights.detach())
        self._experts = nn.ModuleList(Int4Weight(weight, device) for weight in each)

    def __getitem__(self, index: int | torch.Tensor) -> nn.Module:
        return self._experts[int(index)]


class _Int4Function(torch.autograd.Function):
    """Only the inputs have a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
        ctx.weight = weight
        return weight.multiply(inputs.detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad_outputs[0]
        return (grad.to(torch.bfloat16) @ ctx.weight.dequantized()).to(grad.dtype), None


@functools.lru_cache
@torch.inference_mode()
def few_rows() -> int:
    """Up to how many rows of inputs the kernel for CPUs is faster than unpacking and multiplying in 16 bits."""
    weight = _tried_weight()
    inputs = torch.ones(_TRIED_ROWS, weight.columns, dtype=torch.bfloat16)
    kernel = unpacking = math.inf
    with computing():
        for _ in range(8):
            began = time.perf_counter()
            _packed._weight_int4pack_mm_for_cpu(inputs, weight.packed, GROUP, weight.scales)
            between = time.perf_counter()
            weight._unpacked_product(inputs)
            kernel = min(kernel, between - began)
            unpacking = min(unpacking, time.perf_counter() - between)
    found = int(_TRIED_ROWS * unpacking / kernel)
    logger.debug("Up to %d rows are multiplied in four bits, more in 16", found)
    return found


@functools.lru_cache
@torch.inference_mode()
def times_of_16_bits() -> float:
    """How long a product of one row takes on this CPU, in times of what it takes with weights in bfloat16."""
    weight = _tried_weight()
    plain, inputs = weight.dequantized().contiguous(), torch.ones(1, weight.columns, dtype=torch.bfloat16)
    few_rows()
    ours = theirs = math.inf
    with computing():
        for _ in range(12):
            began = time.perf_counter()
            weight.multiply(inputs)
            between = time.perf_counter()
            nn.functional.linear(inputs, plain)
            ours, theirs = min(ours, between - began), min(theirs, time.perf_counter() - between)
    return ours / theirs


@functools.lru_cache
def _tried_weight() -> Int4Weight:
    return Int4Weight(torch.linspace(-1, 1, math.prod(_TRIED_SHAPE)).view(_TRIED_SHAPE), torch.device("cpu"))


@dataclass(frozen=True)
class _Order:
    """Of packed levels: blocks of so many rows, in each of which a byte has two rows' levels of one column."""

    block: int
    dim: int  # -2: the second half's rows lie in the upper bits; -1: every other row


@functools.lru_cache
@torch.inference_mode()
def _order() -> _Order | None:
    """How this torch packs for this processor; None if it does not, or in a way that is not known."""
    try:
        levels = torch.arange(2 * _UNIT * GROUP).mul(7).remainder(61).remainder(16).view(2 * _UNIT, GROUP)
        packed = _pack_for_cpu(levels)
        for block in (64, 32, 16):
            for dim in (-2, -1):
                taken = packed.view(-1, GROUP, block // 2)
                found = torch.stack((taken & 15, taken >> 4), dim).view(-1, GROUP, block).transpose(1, 2)
                if torch.equal(found.reshape(2 * _UNIT, GROUP), levels.to(torch.uint8)):
                    return _Order(block, dim)
    except (AttributeError, RuntimeError, TypeError) as e:
        logger.info("This torch does not multiply in four bits on a CPU: %s", e)
    return None


def _padded(rows: int) -> int:
    return -(-rows // _UNIT) * _UNIT


def _pieces(rows: int, columns: int) -> Iterator[range]:
    step = max(_PIECE // columns // _UNIT, 1) * _UNIT
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


def _quantized(weight: torch.Tensor, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Of these rows, some of which may be padding: levels [rows, columns], and what is kept of scales and zeros."""
    own = weight[rows.start : rows.stop]
    own = nn.functional.pad(own.detach().cpu(), (0, 0, 0, len(rows) - len(own)))
    levels, scales = quantize(own)
    return levels, scales.transpose(0, 1).contiguous().bfloat16()


def _pack_for_cpu(levels: torch.Tensor) -> torch.Tensor:
    return _packed._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 1)


def _pack_on_card(levels: torch.Tensor, device: torch.device) -> torch.Tensor:
    columns = levels.shape[1]
    tiles = next(tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0)
    levels = levels.to(device)
    return _packed._convert_weight_to_int4pack(levels[:, ::2] << 4 | levels[:, 1::2], tiles)
