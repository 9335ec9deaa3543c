"""Forward and backward passes in pieces: as the span computes them at once, and with room for others between."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from petals_win.models.source import open_model
from petals_win.span import passes as module
from petals_win.span.passes import Passes
from petals_win.span.span import Span

HIDDEN = 64


@pytest.fixture(params=["llama", "gpt2", "bloom"])
def span(request, checkpoint) -> Span:
    return Span.load(open_model(str(checkpoint(request.param))), 0, 4)


def states(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prompt_rows", [0, 1, 5])
@pytest.mark.parametrize(("piece_s", "piece_tokens"), [(0.0, 14), (60.0, 10_000)], ids=["many pieces", "few pieces"])
def test_pieces_give_what_the_whole_gives(span, compute, monkeypatch, prompt_rows, piece_s, piece_tokens):
    monkeypatch.setattr(module, "_PIECE_S", piece_s)
    monkeypatch.setattr(module, "_PIECE_TOKENS", piece_tokens)
    hidden, grad_out = states(5, 7), states(5, 7, 1)
    prompts = [states(prompt_rows, 3, 2 + block) for block in range(3)] if prompt_rows else None
    passes = Passes(span, compute, 2.0)

    async def both():
        output = await passes.forward(hidden, 1, 4, prompts=prompts)
        return output, *await passes.backward(hidden, grad_out, 1, 4, prompts=prompts)

    output, grad, of_prompts = asyncio.run(asyncio.wait_for(both(), 60))
    torch.testing.assert_close(output, span.forward(hidden, 1, 4, prompts=prompts), rtol=1e-4, atol=1e-5)
    wanted, wanted_prompts = span.backward(hidden, grad_out, 1, 4, prompts=prompts)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_prompts, wanted_prompts, rtol=1e-4, atol=1e-5)


def test_others_compute_between_two_pieces_and_a_pass_that_is_given_up_ends(span, compute, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_S", 0.0)
    passes, pieces, seen, given_up = Passes(span, compute, 2.0), [], [], threading.Event()
    run = passes._forward_piece

    def counting(piece, adapter):
        pieces.append((piece.start, piece.end))
        if len(pieces) == 1:
            compute.submit(lambda: seen.append(len(pieces)), priority=1.0)
        if len(pieces) == 5:
            given_up.wait(30)
        return run(piece, adapter)

    monkeypatch.setattr(passes, "_forward_piece", counting)

    async def ask():
        await passes.forward(states(1, 4), 0, 4)
        giving_up = asyncio.create_task(passes.forward(states(1, 4), 0, 4))
        while len(pieces) < 5:
            await asyncio.sleep(0.001)
        giving_up.cancel()
        given_up.set()
        with pytest.raises(asyncio.CancelledError):
            await giving_up

    asyncio.run(asyncio.wait_for(ask(), 60))
    compute.submit(lambda: None).result(30)
    assert seen == [1] and pieces[:4] == [(0, 1), (1, 2), (2, 3), (3, 4)] and len(pieces) == 5
