"""Weights in groups of four bits, which our own kernels multiply with on a CPU, and torch's on an NVIDIA card.

Knows how either kernel wants them, and private operators of torch. Does not know which levels are best (span/rounding.py, and on a CPU the
kernels themselves), nor models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from petals_win.host.threads import share_out
from petals_win.kernels.library import GROUP, INT4, MOST_ROWS, PANEL, Kernels, Linear, kernels
from petals_win.models.four_bits import Groups, UnreadGroups
from petals_win.span.packed_linear import can_pack
from petals_win.span.rounding import ON_CARD, ON_CPU, check_finite, quantize, take_over

_UNIT = 64  # rows; weights are padded to a multiple, so that no kernel has a rest
_FEWEST_ROWS = 64  # a smaller layer takes next to nothing, and more with its padding
_PIECE = 2**18  # weights that are quantized or unpacked at once: what the nearest memory holds
_PIECE_ON_CARD = 2**20
_TILE_ROWS = 8  # of a weight on a card
_UNPACKED_AT_ONCE = 1024  # columns of a weight on a card

_Weight = torch.Tensor | Groups | UnreadGroups


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
    return "" if kernels() is not None else "there are no kernels for this processor"


class Panels(nn.Module):
    """A weight on the CPU as our kernels read it: uint8 [panels, groups, bytes], src/kernels/blocks.c says of what."""

    panels: torch.Tensor
    kind = INT4
    group_bytes: ClassVar[int] = (4 + GROUP // 2) * PANEL

    def __init__(self, panels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("panels", panels, persistent=False)

    @classmethod
    def of(cls, weight: Any, rows: int, _device: torch.device) -> Panels:
        """Of a weight [at most rows, columns], with zeros for what it lacks, piece by piece and by as many threads as torch has.

        `rows` are those of whole panels.
        """
        columns = weight.shape[1]
        panels = torch.empty(rows // PANEL, columns // GROUP, cls.group_bytes, dtype=torch.uint8)

        def fill(some: range) -> None:
            cls.fill(panels[some.start // PANEL : some.stop // PANEL], weight[some.start : some.stop])

        share_out(fill, _pieces(rows, columns, _PIECE))
        return cls(panels)

    @classmethod
    def fill(cls, panels: torch.Tensor, some: Any) -> None:
        """These panels from as many rows of a weight as there are: plain ones are quantized, groups taken over."""
        if isinstance(some, Groups):
            panels.copy_(cls.pack(*_with_rows(len(panels) * PANEL, *take_over(some, ON_CPU))))
            return
        some = some if some.dtype in (torch.float32, torch.bfloat16) else some.float()
        check_finite(_library().quantize(some, panels))

    @staticmethod
    def pack(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """[panels, groups, bytes]: scales and least values of the panel's rows, then the levels, two columns in a byte."""
        panels, groups = len(levels) // PANEL, scales.shape[1]
        kept = scales.view(panels, PANEL, groups, 2).permute(0, 2, 3, 1).contiguous().view(torch.uint8)
        halves = levels.view(panels, PANEL, groups, 2, GROUP // 2).permute(3, 0, 2, 4, 1)
        return torch.cat([kept.flatten(2), (halves[0] | halves[1] << 4).flatten(2)], -1)

    def multiply(self, inputs: torch.Tensor, rows: int) -> torch.Tensor:
        """[tokens, columns] to [tokens, rows], of the weight's first rows."""
        # In 16 bits where the inputs have no more, and the processor multiplies such numbers.
        short = inputs.dtype is torch.bfloat16 and can_pack(torch.bfloat16) and len(inputs) > MOST_ROWS
        if not short:
            layer = Linear(self.panels.data_ptr(), None, rows, inputs.shape[1], self.kind)
            return _library().linear(layer, inputs.float())
        output = inputs.new_empty(len(inputs), len(self.panels) * PANEL)
        for which in _pieces(len(self.panels) * PANEL, inputs.shape[1], _PIECE):
            torch.mm(inputs, self._columns(which, inputs.dtype), out=output[:, which.start : which.stop])
        return output[:, :rows]

    def dequantized(self, rows: int) -> torch.Tensor:
        """The values that stand for the weight's first rows, float32 [rows, columns]."""
        return self._columns(range(len(self.panels) * PANEL), torch.float32).t()[:rows]

    def _columns(self, rows: range, dtype: torch.dtype) -> torch.Tensor:
        """Of these rows, [columns, rows]; they begin and end with a panel."""
        panels = self.panels[rows.start // PANEL : rows.stop // PANEL]
        values = torch.empty(panels.shape[1] * GROUP, len(rows), dtype=dtype)
        _library().unpack(panels, self.kind, values)
        return values


class Tiles(nn.Module):
    """A weight on a card as torch's kernel reads it."""

    packed: torch.Tensor
    scales: torch.Tensor  # and zeros, bfloat16 [groups, padded rows, 2]

    def __init__(self, pieces: Iterator[tuple[torch.Tensor, torch.Tensor]], rows: int, device: torch.device) -> None:
        """Of levels and scales as `quantize` returns them for pieces of a weight with so many rows in all, packed on the card one by one."""
        super().__init__()
        scales: list[torch.Tensor] = []

        def packed() -> Iterator[torch.Tensor]:
            for levels, scales_of_piece in pieces:
                scales.append(scales_of_piece.transpose(0, 1))
                yield _tiles(levels.to(device))

        self.register_buffer("packed", _joined(packed(), rows // _TILE_ROWS), persistent=False)
        self.register_buffer("scales", torch.cat(scales, 1).contiguous().to(device), persistent=False)

    @classmethod
    def of(cls, weight: _Weight, rows: int, device: torch.device) -> Tiles:
        """As of Panels; plain weights are quantized on the card."""
        pieces = _pieces(rows, weight.shape[1], _PIECE_ON_CARD)
        return cls((cls._piece(weight[some.start : some.stop], len(some), device) for some in pieces), rows, device)

    @staticmethod
    def _piece(some: torch.Tensor | Groups, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(some, Groups):
            return _with_rows(rows, *take_over(some, ON_CARD))
        return _with_rows(rows, *quantize(some.to(device), ON_CARD))

    def multiply(self, inputs: torch.Tensor, rows: int) -> torch.Tensor:
        """[tokens, columns] to [tokens, rows], of the weight's first rows."""
        return self._product(inputs.to(torch.bfloat16).contiguous())[:, :rows]

    def dequantized(self, rows: int) -> torch.Tensor:
        """The values that stand for the weight's first rows, bfloat16 [rows, columns]."""
        columns = len(self.scales) * GROUP
        values = self.scales.new_empty(columns, rows)
        # For all at once the inputs would take more than the weight.
        for first in range(0, columns, _UNPACKED_AT_ONCE):
            part = values[first : first + _UNPACKED_AT_ONCE]
            inputs = values.new_zeros(len(part), columns)
            inputs.diagonal(first).fill_(1)
            part.copy_(self._product(inputs)[:, :rows])
        return values.t()

    def _product(self, inputs: torch.Tensor) -> torch.Tensor:
        if not len(inputs):  # a launch of no threads is an error
            return inputs.new_empty(0, self.scales.shape[1])
        return torch.ops.aten._weight_int4pack_mm(inputs, self.packed, GROUP, self.scales)


class FewBits(nn.Module):
    """A weight [rows, columns] in few bits. Stands for it in linear() and @, so that code that computes with it stays as it is."""

    order: torch.Tensor | None  # int32 [columns]: which input each column that is kept is multiplied by

    def __init__(self, rows: int, columns: int, kept: Panels | Tiles, order: torch.Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.columns, self.kept = rows, columns, kept
        self.register_buffer("order", order, persistent=False)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] to [..., rows], of the same dtype."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            return _Function.apply(inputs, self)
        flat = inputs.reshape(-1, self.columns)
        output = self.kept.multiply(flat if self.order is None else flat[:, self.order], self.rows)
        return output.to(inputs.dtype).unflatten(0, inputs.shape[:-1])

    def dequantized(self) -> torch.Tensor:
        """The values that stand for the weight, [rows, columns]."""
        values = self.kept.dequantized(self.rows)
        return values if self.order is None else values[:, torch.argsort(self.order)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _MULTIPLYING and len(args) >= 2 and isinstance(args[1], FewBits) and not kwargs:
            result = args[1].multiply(args[0])
            return result if len(args) < 3 or args[2] is None else result + args[2]
        raise TypeError(f"A weight in few bits cannot be used by {func}")

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}"


class Int4Weight(FewBits):
    """A weight in groups of four bits."""

    def __init__(self, weight: _Weight, device: torch.device) -> None:
        """`weight` is one that has a place; piece by piece it is quantized and packed for `device`. Groups stay as they are."""
        rows, columns = weight.shape
        order = None
        if isinstance(weight, torch.Tensor):
            weight = weight.detach()
        elif weight.order is not None:
            order = weight.order.to(device, torch.int32)
        kept = Panels if device.type == "cpu" else Tiles
        super().__init__(rows, columns, kept.of(weight, _padded(rows), device), order)


_MULTIPLYING = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class FewBitsLinear(nn.Linear):
    """Computes what nn.Linear does. Frozen. A subclass, so that peft adds to it what it adds to one."""

    def __init__(self, weight: FewBits, bias: nn.Parameter | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight.columns, weight.rows, bias=False, device="meta")
        # Tells whoever asks the layer where and in what it computes.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.bias = bias
        self.few_bits = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as in nn.Linear
        """[..., in] to [..., out]."""
        output = self.few_bits.multiply(input)
        return output if self.bias is None else output + self.bias


class ScatteredLinear(FewBitsLinear):
    """One whose weight has an order of inputs of its own. Another class, since no kernel computes a block with such layers."""


def few_bits_linear(
    weight: FewBits, bias: nn.Parameter | None, device: torch.device, dtype: torch.dtype
) -> FewBitsLinear:
    """The layer for a weight."""
    kind = FewBitsLinear if weight.order is None else ScatteredLinear
    return kind(weight, bias, device, dtype)


class FewBitsStack(nn.Module):
    """In the place of a tensor of weights [experts, …]: each of them by its number."""

    def __init__(self, weights: Iterable[FewBits]) -> None:
        """`weights` are the experts', [rows, columns] each."""
        super().__init__()
        self._experts = nn.ModuleList(weights)

    def __getitem__(self, index: int | torch.Tensor) -> nn.Module:
        return self._experts[int(index)]


class _Function(torch.autograd.Function):
    """Only the inputs have a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: FewBits) -> torch.Tensor:
        ctx.weight = weight
        return weight.multiply(inputs.detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad, values = grad_outputs[0], ctx.weight.dequantized()
        return (grad.to(values.dtype) @ values).to(grad.dtype), None


def _padded(rows: int) -> int:
    return -(-rows // _UNIT) * _UNIT


def _pieces(rows: int, columns: int, most: int) -> Iterator[range]:
    """Of a weight's rows, with about so many values each."""
    step = max(most // columns // _UNIT, 1) * _UNIT
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


def _with_rows(rows: int, levels: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with so many rows."""
    lacking = rows - len(levels)
    return nn.functional.pad(levels, (0, 0, 0, lacking)), nn.functional.pad(scales, (0, 0, 0, 0, 0, lacking))


def _joined(pieces: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """The pieces one behind the other, `length` of what they have along their first dimension; no two of them are in memory with it."""
    whole, end = torch.empty(0), 0
    for piece in pieces:
        if not end:
            whole = piece.new_empty(length, *piece.shape[1:])
        whole[end : end + len(piece)] = piece
        end += len(piece)
    return whole


def _library() -> Kernels:
    library = kernels()
    assert library is not None  # why_not() has asked
    return library


def _tiles(levels: torch.Tensor) -> torch.Tensor:
    """int32 [rows / 8, columns / (16 x tiles), 32, tiles / 2], of bytes with the even column in their upper half."""
    tiles = next(tiles for tiles in (8, 4, 2) if levels.shape[1] % (16 * tiles) == 0)
    # Those of a weight that was stored [in, out] lie so still.
    pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
