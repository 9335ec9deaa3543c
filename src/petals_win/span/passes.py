"""Forward and backward passes of fine-tuning, in pieces between which the compute thread is free for the steps of sessions.

A piece is a few rows in a few blocks, of so many that it takes a fraction of a second. Knows a span and the compute thread. Does not
know sessions or networks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petals_win.span.compute import ComputeThread
from petals_win.span.span import Span

_PIECE_S = 0.15  # of a forward piece; the backward one takes some three times as long
_PIECE_TOKENS = 1024  # of all rows, if it is more than one
_GROWTH = 4.0  # times as many blocks at most as in the piece before

Learned = Sequence[torch.Tensor] | None


@dataclass(frozen=True)
class _Piece:
    """What the blocks [start, end) get, and the deep prompts of each of them."""

    hidden: torch.Tensor
    start: int
    end: int
    prompts: Learned


class Passes:
    """Runs them at `priority` of a call of the compute thread, one piece at a time for each request."""

    def __init__(self, span: Span, compute: ComputeThread, priority: float) -> None:
        self._span, self._compute, self._priority = span, compute, priority

    async def forward(
        self, hidden: torch.Tensor, start: int, end: int, *, prompts: Learned = None, adapter: str = ""
    ) -> torch.Tensor:
        """As Span.forward, on the CPU."""
        outputs = [
            (await self._through(hidden[rows], start, end, _of_rows(prompts, rows), adapter))[1]
            for rows in _rows_of_pieces(hidden)
        ]
        return torch.cat(outputs)

    async def backward(
        self,
        hidden: torch.Tensor,
        grad_out: torch.Tensor,
        start: int,
        end: int,
        *,
        prompts: Learned = None,
        adapter: str = "",
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """As Span.backward, on the CPU. Inputs are computed anew piece by piece, and no more than one piece keeps its graph."""
        of_hidden: list[torch.Tensor] = []
        of_prompts: list[list[torch.Tensor]] = []
        for rows in _rows_of_pieces(hidden):
            grad, found = grad_out[rows], list[torch.Tensor]()
            pieces, _ = await self._through(hidden[rows], start, end, _of_rows(prompts, rows), adapter)
            for piece in reversed(pieces):
                grad, learned = await self._compute.submit(
                    self._backward_piece, piece, grad, adapter, priority=self._priority
                )
                found[:0] = learned
            of_hidden.append(grad)
            of_prompts.append(found)
        if prompts is None:
            return torch.cat(of_hidden), None
        by_block = zip(prompts, zip(*of_prompts, strict=True), strict=True)
        return torch.cat(of_hidden), [_joined(grads, len(prompt) == len(hidden)) for prompt, grads in by_block]

    async def _through(
        self, hidden: torch.Tensor, start: int, end: int, prompts: Learned, adapter: str
    ) -> tuple[list[_Piece], torch.Tensor]:
        """The pieces of a forward pass, and what comes out of the last one."""
        pieces, blocks, first = list[_Piece](), 1, start
        while start < end:
            stop = min(self._span.cuts.after(start + blocks), end)
            piece = _Piece(hidden, start, stop, None if prompts is None else prompts[start - first : stop - first])
            hidden, seconds = await self._compute.submit(self._forward_piece, piece, adapter, priority=self._priority)
            pieces.append(piece)
            blocks = max(1, round((stop - start) * min(_PIECE_S / max(seconds, 1e-6), _GROWTH)))
            start = stop
        return pieces, hidden

    def _forward_piece(self, piece: _Piece, adapter: str) -> tuple[torch.Tensor, float]:
        began = time.perf_counter()
        output = self._span.forward(piece.hidden, piece.start, piece.end, prompts=piece.prompts, adapter=adapter).cpu()
        return output, time.perf_counter() - began

    def _backward_piece(
        self, piece: _Piece, grad: torch.Tensor, adapter: str
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        grad, learned = self._span.backward(
            piece.hidden, grad, piece.start, piece.end, prompts=piece.prompts, adapter=adapter
        )
        return grad.cpu(), [each.cpu() for each in learned or () if each is not None]


def _rows_of_pieces(hidden: torch.Tensor) -> list[slice]:
    rows, tokens, _ = hidden.shape
    count = max(1, _PIECE_TOKENS // max(tokens, 1))
    return [slice(begin, begin + count) for begin in range(0, max(rows, 1), count)]


def _of_rows(prompts: Learned, rows: slice) -> Learned:
    return prompts and [prompt if len(prompt) == 1 else prompt[rows] for prompt in prompts]


def _joined(grads: Sequence[torch.Tensor], by_row: bool) -> torch.Tensor:
    """Of all pieces' rows; a prompt that all rows share has part of its gradient from each piece."""
    return torch.cat(list(grads)) if by_row else torch.stack(list(grads)).sum(dim=0)
