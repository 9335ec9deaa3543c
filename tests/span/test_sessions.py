"""Sessions, forward and backward passes of a span: prompts, gradients, limits, and what a failed step leaves behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_win.models.architecture import find_blocks
from petals_win.models.source import ModelSource, open_model
from petals_win.span import cache as cache_module
from petals_win.span import span as span_module
from petals_win.span.session import Session
from petals_win.span.span import Span

BATCH, HIDDEN = 2, 64


@pytest.fixture(scope="module")
def source(checkpoint) -> ModelSource:
    return open_model(str(checkpoint("llama")))


@pytest.fixture
def span(source) -> Span:
    return Span.load(source, 1, 4)


def hidden_states(tokens: int, seed: int = 0, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Reference:
    """The blocks 1 to 3 of the whole model, with prompts, in transformers' own forward pass and autograd."""

    def __init__(self, source: ModelSource):
        self._model = source.whole_model()
        self._layers = find_blocks(self._model).layers

    def __call__(self, hidden: torch.Tensor, prompts: list[torch.Tensor | None] | None = None) -> torch.Tensor:
        output: list[torch.Tensor] = []

        def give(index):
            def enter(_module, args, kwargs):
                states = hidden if index == 1 else args[0]
                if prompts is not None and prompts[index - 1] is not None:
                    prompt = prompts[index - 1]
                    states = torch.cat([states[:, : prompt.shape[1]] + prompt, states[:, prompt.shape[1] :]], dim=1)
                return (states, *args[1:]), kwargs

            return enter

        hooks = [self._layers[i].register_forward_pre_hook(give(i), with_kwargs=True) for i in (1, 2, 3)]
        hooks.append(self._layers[3].register_forward_hook(lambda _m, _a, result: output.append(result)))
        self._model(torch.ones(hidden.shape[:2], dtype=torch.int64), use_cache=False)
        for hook in hooks:
            hook.remove()
        return output[0]


def close_to(expected: torch.Tensor) -> torch.Tensor:
    return pytest.approx(expected.numpy(), abs=2e-5, rel=1e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["a prompt for each row", "one prompt for all rows"])
def test_prompts(source, span, shared):
    hidden = hidden_states(6)
    prompts = [hidden_states(3, seed=1, batch=1 if shared else BATCH), None, hidden_states(2, seed=2)]
    with torch.no_grad():
        expected = Reference(source)(hidden, prompts)
        assert (expected - Reference(source)(hidden)).abs().max() > 0.1
    assert span.forward(hidden, 1, 4, prompts=prompts).numpy() == close_to(expected)
    session = span.open(BATCH, 6)
    assert span.step(session, hidden, prompts=prompts).numpy() == close_to(expected)


def test_gradients(source, span):
    hidden, grad_out = hidden_states(6), hidden_states(6, seed=3)
    prompts = [hidden_states(3, seed=1), None, hidden_states(2, seed=2)]
    inputs = hidden.clone().requires_grad_()
    learned = [prompt if prompt is None else prompt.clone().requires_grad_() for prompt in prompts]
    Reference(source)(inputs, learned).backward(grad_out)

    grad_hidden, grad_prompts = span.backward(hidden, grad_out, 1, 4, prompts=prompts)
    assert grad_hidden.numpy() == close_to(inputs.grad)
    assert grad_prompts[1] is None
    for index in (0, 2):
        assert grad_prompts[index].numpy() == close_to(learned[index].grad)
    assert not hidden.requires_grad


def test_gradients_through_a_chain_of_spans(source):
    """As a client trains through two nodes: the gradient that one returns is what the one before it gets."""
    first, second = Span.load(source, 1, 2), Span.load(source, 2, 4)
    hidden, grad_out = hidden_states(5), hidden_states(5, seed=3)
    inputs = hidden.clone().requires_grad_()
    Reference(source)(inputs).backward(grad_out)

    between = first.forward(hidden, 1, 2)
    grad, none = second.backward(between, grad_out, 2, 4)
    assert none is None
    grad, _ = first.backward(hidden, grad, 1, 2)
    assert grad.numpy() == close_to(inputs.grad)


def test_a_part_of_the_span(source, span):
    hidden = hidden_states(5)
    parts = span.forward(span.forward(hidden, 1, 2), 2, 4)
    assert torch.equal(parts, span.forward(hidden, 1, 4))
    session = span.open(BATCH, 5, start=2, end=4)
    assert span.step(session, span.forward(hidden, 1, 2)).numpy() == close_to(parts)
    for start, end in ((0, 2), (3, 5), (2, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"1:4; {start}:{end} is no part"):
            span.forward(hidden, start, end)
        with pytest.raises(ValueError, match=f"1:4; {start}:{end} is no part"):
            span.open(1, 1, start, end)


def test_a_long_prompt_goes_through_in_pieces(span, monkeypatch):
    hidden = hidden_states(23)
    prompts = [hidden_states(9, seed=1), None, None]
    whole = span.step(span.open(BATCH, 23), hidden, prompts=prompts)
    monkeypatch.setattr(span_module, "CHUNK_TOKENS", 8)  # four tokens of each row at a time
    seen = []
    run = span._decoder.run
    monkeypatch.setattr(span._decoder, "run", lambda *args: seen.append(args[0].shape[1]) or run(*args))
    pieces = span.step(span.open(BATCH, 23), hidden, prompts=prompts)
    assert seen == [4, 4, 4, 4, 4, 3]
    assert pieces.numpy() == close_to(whole)


def test_rows_are_independent(span):
    hidden = hidden_states(7)
    session = span.open(BATCH, 7)
    both = span.step(session, hidden)
    for row in range(BATCH):
        alone = span.step(span.open(1, 7), hidden[row : row + 1])
        assert alone[0].numpy() == close_to(both[row])


def test_sessions_are_independent(span):
    a, b = hidden_states(4, seed=1), hidden_states(4, seed=2)
    alone = span.step(span.open(BATCH, 4), a)
    first, second = span.open(BATCH, 4), span.open(BATCH, 4)
    outputs = []
    for token in range(4):
        outputs.append(span.step(first, a[:, token : token + 1]))
        span.step(second, b[:, token : token + 1])
    assert torch.cat(outputs, dim=1).numpy() == close_to(alone)


def test_limits_of_a_session(span):
    with pytest.raises(ValueError, match="at least one"):
        span.open(0, 4)
    with pytest.raises(ValueError, match="at least one"):
        span.open(1, 0)
    session = span.open(BATCH, 4)
    assert session.position == 0
    span.step(session, hidden_states(3))
    assert session.position == 3
    with pytest.raises(ValueError, match="holds 4 tokens, 3 are used; 2 more"):
        span.step(session, hidden_states(2))
    with pytest.raises(ValueError, match="2 rows, the hidden states have 3"):
        span.step(session, hidden_states(1, batch=3))
    with pytest.raises(ValueError, match="0 more"):
        span.step(session, hidden_states(0))
    with pytest.raises(ValueError, match=r"\[batch, tokens, 64\], not \[2, 1, 63\]"):
        span.step(session, hidden_states(1)[..., :63])
    assert session.position == 3
    span.step(session, hidden_states(1))
    assert session.position == session.max_length == 4


def test_a_closed_session(span):
    session = span.open(BATCH, 4)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        span.step(session, hidden_states(1))
    with pytest.raises(ValueError, match="closed"):
        _ = session.position


@pytest.mark.parametrize(
    "rows", [[0], [0, 2], [0, -1], [[0, 1]], [0.0, 1.0]], ids=["too few", "too large", "negative", "matrix", "floats"]
)
def test_rows_that_are_none_of_the_session(span, rows):
    session = span.open(BATCH, 4)
    span.step(session, hidden_states(2))
    with pytest.raises(ValueError, match="hypo_ids"):
        span.step(session, hidden_states(1), hypo_ids=torch.tensor(rows))
    assert session.position == 2, "nothing was reordered"


def test_prompts_that_do_not_fit(span):
    hidden = hidden_states(3)
    with pytest.raises(ValueError, match="prompts for 2 blocks, but 3"):
        span.forward(hidden, 1, 4, prompts=[hidden_states(1)] * 2)
    with pytest.raises(ValueError, match="1 or 2, tokens, 64"):
        span.forward(hidden, 1, 4, prompts=[hidden_states(1, batch=3), None, None])
    with pytest.raises(ValueError, match="1 or 2, tokens, 64"):
        span.forward(hidden, 1, 4, prompts=[hidden_states(1)[..., :8], None, None])


def test_tokens_are_taken_back(span):
    hidden = hidden_states(9)
    expected = span.step(span.open(BATCH, 9), hidden)
    session = span.open(BATCH, 9)
    span.step(session, hidden[:, :5])
    span.step(session, -hidden[:, 5:8])
    assert span.step(session, hidden[:, 5:7], start=5).numpy() == close_to(expected[:, 5:7])
    session.truncate(3)
    assert session.position == 3
    assert span.step(session, hidden[:, 3:]).numpy() == close_to(expected[:, 3:])
    assert span.step(session, hidden, start=0).numpy() == close_to(expected)
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match="cannot be kept"):
            session.truncate(wrong)


def fail_at_second_call(session: Session, block: int):
    """A GPU out of memory, say."""
    session.open_cache.places = None
    slots: Any = session.open_cache.layers[block - session.start]
    calls = 0

    def failing(usual):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise RuntimeError("out of memory")
            return usual(*args)

        return call

    slots.update, slots.append, slots.place = failing(slots.update), failing(slots.append), failing(slots.place)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_failed_step_can_be_made_again(span, block, monkeypatch):
    hidden = hidden_states(5)
    untouched, failing = span.open(BATCH, 8), span.open(BATCH, 8)
    for session in (untouched, failing):
        span.step(session, hidden[:, :2])
    expected = span.step(untouched, hidden[:, 2:])

    monkeypatch.setattr(span_module, "CHUNK_TOKENS", 2)  # the first piece passes, the second fails
    fail_at_second_call(failing, block)
    with pytest.raises(RuntimeError, match="out of memory"):
        span.step(failing, hidden[:, 2:])
    assert failing.position == 2
    assert span.step(failing, hidden[:, 2:]).numpy() == close_to(expected)


def test_a_failed_step_that_reordered_rows_closes_the_session(span, monkeypatch):
    """Its rows were overwritten: going on from them would give wrong numbers without a word."""
    session, hidden = span.open(BATCH, 8), hidden_states(5)
    span.step(session, hidden[:, :2])
    monkeypatch.setattr(span_module, "CHUNK_TOKENS", 2)
    fail_at_second_call(session, 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        span.step(session, hidden[:, 2:], hypo_ids=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="closed"):
        span.step(session, hidden[:, 2:])


def test_bytes_of_sessions(span):
    # two heads for keys and two for values, 16 numbers each, in float32
    assert span.block_cache_bytes_per_token == 2 * 2 * 16 * 4
    assert span.cache_bytes_per_token == 3 * span.block_cache_bytes_per_token
    session = span.open(2, 50, 2, 4)
    held = sum(tensor.nbytes for layer in session.cache.layers for tensor in (layer.keys, layer.values))
    assert span.session_bytes(2, 50, 2, 4) == held == 2 * 50 * 2 * span.block_cache_bytes_per_token


def test_a_span_in_half_precision(checkpoint):
    source = open_model(str(checkpoint("llama", dtype=torch.bfloat16)))
    span = Span.load(source, 0, 4)
    assert span.dtype is torch.bfloat16
    session = span.open(1, 8)
    assert span.step(session, hidden_states(3, batch=1)).dtype is torch.bfloat16
    exact = Span.load(source, 0, 4, dtype=torch.float32)
    hidden = hidden_states(6, batch=1).bfloat16()
    expected = exact.forward(hidden, 0, 4)
    error = (span.forward(hidden, 0, 4).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.02  # bfloat16 keeps 8 bits


def test_inputs_of_another_dtype_are_taken(span):
    hidden = hidden_states(3)
    assert torch.equal(span.forward(hidden.half(), 1, 4), span.forward(hidden.half().float(), 1, 4))


def test_an_adapter_that_is_not_there(span):
    with pytest.raises(KeyError, match="no adapter 'pirate'"):
        span.open(1, 4, adapter="pirate")
    with pytest.raises(KeyError, match="no adapter 'pirate'"):
        span.forward(hidden_states(1), 1, 4, adapter="pirate")


def test_backward_needs_a_gradient_of_the_output_s_shape(span):
    with pytest.raises((ValueError, RuntimeError), match="(?i)shape"):
        span.backward(hidden_states(3), hidden_states(2), 1, 4)


def test_the_model_of_the_source_generates(source, checkpoint):
    """The reference of the other tests is transformers' own model."""
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(source.whole_model()(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3", "falcon", "bloom"])
def test_a_cache_that_grows_answers_as_one_that_was_allocated_at_once(checkpoint, family):
    """Bit for bit, windows, latent keys and reordered rows included."""
    span = Span.load(open_model(str(checkpoint(family))), 0, 4)
    whole, growing = span.open(BATCH, 120), span.open(BATCH, 120, room=9)
    hidden, order = hidden_states(100), torch.tensor([1, 0])
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 60), *((at, at + 1) for at in range(60, 100))):
        if end > growing.room:
            with pytest.raises(ValueError, match=f"holds {growing.room} tokens"):
                span.step(growing, hidden[:, start:end])
            growing.room = min(end + 5, 120)
        rows = order if start % 7 == 0 else None
        outputs = [span.step(session, hidden[:, start:end], hypo_ids=rows) for session in (whole, growing)]
        assert torch.equal(*outputs), f"tokens {start} to {end}"
    assert growing.cache is not None and growing.cache.capacity == growing.room < whole.room


def test_memory_of_a_closed_session_is_free_at_once(span):
    """Python's collector must not be needed: tensors do not make it run."""
    session = span.open(1, 500)
    assert session.cache is not None
    held = [weakref.ref(layer.keys) for layer in session.cache.layers]
    gc.disable()
    try:
        session.close()
        del session
        assert [tensor() for tensor in held] == [None] * len(held)
    finally:
        gc.enable()


def test_a_growth_that_fails_leaves_the_session_as_it_was(span, monkeypatch):
    session, hidden = span.open(BATCH, 20, room=4), hidden_states(8)
    expected = span.step(span.open(BATCH, 20), hidden)
    span.step(session, hidden[:, :4])
    session.room = 20
    memory, calls = cache_module.allocate, iter(range(100))

    def too_little(*shape):
        if next(calls) == 3:
            raise RuntimeError("not enough memory")
        return memory(*shape)

    monkeypatch.setattr(cache_module, "allocate", too_little)
    with pytest.raises(RuntimeError, match="not enough memory"):
        span.step(session, hidden[:, 4:], hypo_ids=torch.tensor([0, 1]))
    assert session.position == 4
    assert span.step(session, hidden[:, 4:]).numpy() == close_to(expected[:, 4:])
