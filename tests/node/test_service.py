"""The service without a network: what it computes is the span's, and what cannot be is refused before it takes memory."""

from __future__ import annotations

import asyncio
import weakref

import pytest
import torch

from petals_win.errors import NodeFull, NodeRefused
from petals_win.models.source import open_model
from petals_win.node.budget import CacheBudget
from petals_win.node.service import BlockService
from petals_win.span import shortage
from petals_win.span.cache import SessionCache
from petals_win.span.span import Span

MIB = 2**20


@pytest.fixture(scope="module")
def span(checkpoint) -> Span:
    return Span.load(open_model(str(checkpoint("llama"))), 1, 4)


def hidden(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(coroutine, seconds: float = 30):
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def test_steps_are_those_of_the_span_and_memory_comes_back(span, service):
    states = hidden(2, 9, 64)
    wanted = span.forward(states, 2, 4)

    async def ask():
        session = service.open(2, 4, batch_size=2, max_length=100)
        assert service.budget.bytes_left == 8 * MIB, "a promise takes nothing"
        pieces = [await session.step(piece) for piece in states.split([5, 1, 3], dim=1)]
        assert service.budget.bytes_left < 8 * MIB
        session.close()
        session.close()
        while service.budget.bytes_left < 8 * MIB:
            await asyncio.sleep(0.01)
        return torch.cat(pieces, dim=1)

    assert torch.allclose(run(ask()), wanted, atol=1e-5)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The order of sums depends on how many threads there were."""
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_passes_without_a_session(span, service):
    states, grads, prompts = hidden(2, 5, 64), hidden(2, 5, 64, seed=1), hidden(3, 1, 2, 64, seed=2)

    async def ask():
        output = await service.forward(states, 1, 4, prompts=prompts)
        return output, await service.backward(states, grads, 1, 4, prompts=prompts)

    output, (grad, grad_prompts) = run(ask())
    close(output, span.forward(states, 1, 4, prompts=list(prompts)))
    wanted, wanted_prompts = span.backward(states, grads, 1, 4, prompts=list(prompts))
    close(grad, wanted)
    close(grad_prompts, torch.stack(wanted_prompts))
    assert [each.shape for each in run(service.backward(states, grads, 2, 4))] == [states.shape]


@pytest.mark.parametrize(
    ("shape", "why"),
    [((2, 64), "shape"), ((1, 5, 63), "shape"), ((5, 13, 64), "64 tokens"), ((1, 65, 64), "64 tokens")],
)
def test_refused_shapes_of_passes(service, shape, why):
    with pytest.raises(NodeRefused, match=why):
        run(service.forward(torch.zeros(shape), 1, 4))
    with pytest.raises(NodeRefused, match=why):
        run(service.backward(torch.zeros(shape), torch.zeros(shape), 1, 4))


@pytest.mark.parametrize("shape", [(2, 1, 2, 64), (3, 2, 64), (3, 2, 2, 64), (3, 1, 2, 63)])
def test_refused_prompts(service, shape):
    with pytest.raises(NodeRefused, match="rompt"):
        run(service.forward(hidden(1, 5, 64), 1, 4, prompts=torch.zeros(shape)))


def test_gradients_of_another_shape(service):
    with pytest.raises(NodeRefused, match="do not fit"):
        run(service.backward(hidden(1, 5, 64), hidden(1, 4, 64), 1, 4))


@pytest.mark.parametrize(("start", "end"), [(0, 4), (1, 5), (3, 3), (3, 2)])
def test_other_blocks_are_no_refusal_since_another_node_may_have_them(service, start, end):
    for asked in (
        lambda: run(service.forward(hidden(1, 1, 64), start, end)),
        lambda: service.open(start, end, batch_size=1, max_length=10),
    ):
        with pytest.raises(ValueError, match="has the blocks 1:4") as told:
            asked()
        assert not isinstance(told.value, NodeRefused)


def test_an_adapter_that_is_not_here(service):
    with pytest.raises(ValueError, match="no adapter 'pirate'"):
        service.open(1, 4, batch_size=1, max_length=10, adapter="pirate")


@pytest.mark.parametrize(("batch_size", "max_length"), [(0, 10), (1, 0), (-1, 10), (10**9, 10)])
def test_sessions_that_cannot_be(service, batch_size, max_length):
    with pytest.raises(NodeRefused):
        service.open(1, 4, batch_size=batch_size, max_length=max_length)


def test_a_session_is_never_longer_than_the_context(service):
    async def ask():
        session = service.open(1, 4, batch_size=1, max_length=10**9)
        with pytest.raises(NodeRefused, match="512 tokens"):
            await session.step(torch.zeros(1, 513, 64))
        assert service.budget.bytes_left == 8 * MIB
        session.close()

    run(ask())


def test_full_is_told_after_the_client_s_patience(span, compute):
    small = BlockService(
        span, compute, CacheBudget(300 * span.cache_bytes_per_token), context_length=512, request_tokens=64
    )
    assert small.info().session_tokens == 300

    async def ask():
        first, second = (small.open(1, 4, batch_size=1, max_length=300, patience=0.05) for _ in range(2))
        await first.step(hidden(1, 3, 64))
        with pytest.raises(NodeFull, match="taken by 1 of them"):
            await second.step(hidden(1, 3, 64))
        second.close()
        first.close()

    run(ask())


def test_passes_that_the_span_does_not_take_are_refusals_and_failures_stay_failures(service, span, monkeypatch):
    def broken(*_args, **_more):
        raise RuntimeError("the cable is loose")

    monkeypatch.setattr(span, "forward", broken)
    with pytest.raises(RuntimeError, match="cable"):
        run(service.forward(hidden(1, 5, 64), 1, 4))


class Full:
    """Makes a device that has no room for a step or pass of more than 8 tokens, and says so as `error`."""

    def __init__(self, span, monkeypatch, error: RuntimeError):
        self.held: list[weakref.ref] = []
        run = span._decoder.run

        def full(hidden, *rest, **more):
            if hidden.shape[1] > 8:
                activations = hidden.new_zeros(3)
                self.held.append(weakref.ref(activations))
                raise error
            return run(hidden, *rest, **more)

        monkeypatch.setattr(span._decoder, "run", full)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cuBLAS"],
)
def test_a_pass_that_finds_no_memory_is_full_and_the_next_one_is_served(service, span, monkeypatch, error):
    states, freed = hidden(1, 50, 64), []
    expected = span.forward(states[:, :5], 1, 4)
    full = Full(span, monkeypatch, error)
    monkeypatch.setattr(shortage, "give_back_memory", lambda: freed.append(True))

    async def ask():
        session, other = (service.open(1, 4, batch_size=1, max_length=100) for _ in range(2))
        first = await session.step(states[:, :3])
        for what in (
            session.step(states[:, 3:40]),
            service.forward(states, 1, 4),
            service.backward(states, states, 1, 4),
        ):
            with pytest.raises(NodeFull, match="no memory left for a"):
                await what
        rest = await session.step(states[:, 3:5])
        whole = await other.step(states[:, :5])
        await session.close()
        await other.close()
        return torch.cat([first, rest], dim=1), whole

    for found in run(ask()):
        close(found, expected)
    assert len(full.held) == len(freed) == 3 and all(each() is None for each in full.held)
    assert service.budget.bytes_left == 8 * MIB


def test_a_session_that_cannot_grow_is_full_and_goes_on_with_what_it_has(service, span, monkeypatch):
    states = hidden(1, 400, 64)

    async def ask():
        session = service.open(1, 4, batch_size=1, max_length=512)
        await session.step(states[:, :3])
        grow = SessionCache.grow

        def full(cache, capacity):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(SessionCache, "grow", full)
        with pytest.raises(NodeFull, match="no memory left for a conversation"):
            await session.step(states[:, 3:])
        monkeypatch.setattr(SessionCache, "grow", grow)
        rest = await session.step(states[:, 3:])
        await session.close()
        return rest

    close(run(ask()), span.forward(states, 1, 4)[:, 3:])
