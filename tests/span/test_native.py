"""Plain blocks by our kernels: what transformers' code computes, for any mix of sessions, and taken where it may be."""

from __future__ import annotations

import random

import pytest
import torch
from kernels.test_library import variants
from torch import nn

from petals_win.kernels import library
from petals_win.kernels.library import MOST_ROWS, Kernels
from petals_win.models.source import open_model
from petals_win.span import native as native_room
from petals_win.span.int4 import FewBitsLinear
from petals_win.span.native import NativeBlocks, NativeLinear
from petals_win.span.packed_linear import can_pack
from petals_win.span.span import Span
from span.families import FAMILIES
from span.test_lean import PLAIN, WITH_IMAGES, hidden_states, usual, whole_span

DENSE = PLAIN - {"qwen2_moe", "qwen3_moe"}


@pytest.fixture(autouse=True)
def kernels_for_many_rows(monkeypatch):
    """Also in these small models, and whatever this processor is faster with."""
    monkeypatch.setattr(native_room, "_LARGE", 1)
    monkeypatch.setattr(native_room, "many_rows_pay", lambda _dtype: True)


def is_native(span: Span) -> bool:
    return span._joint._native is not None


def test_which_families_take_it(checkpoint):
    native = {family for family in FAMILIES if is_native(whole_span(checkpoint(family)))}
    assert native == DENSE | WITH_IMAGES


@pytest.mark.parametrize("family", sorted(DENSE))
def test_it_computes_the_same(checkpoint, monkeypatch, family):
    source = open_model(str(checkpoint(family)))
    native, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    assert is_native(native) and native.weight_bytes == theirs.weight_bytes
    chance = random.Random(0)
    for batch, blocks in ((1, (0, 4)), (2, (1, 3))):  # blocks from the middle on, and beams
        ours, other = native.open(batch, 60, *blocks, room=12), theirs.open(batch, 60, *blocks, room=12)
        for tokens in (11, 1):
            hidden = hidden_states(batch, tokens, chance.randrange(10**6))
            torch.testing.assert_close(native.step(ours, hidden), theirs.step(other, hidden), atol=1e-5, rtol=1e-5)
        ours.room = other.room = 60  # keys and values move
        for tokens in (1, 3, 1, 20, 1, 8, 1):  # past the windows of 8 tokens
            hidden = hidden_states(batch, tokens, chance.randrange(10**6))
            rows = torch.tensor([batch - 1 - row for row in range(batch)]) if tokens == 3 else None
            outputs = [
                span.step(session, hidden, hypo_ids=rows) for span, session in ((native, ours), (theirs, other))
            ]
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    hidden = hidden_states(2, 5, seed=1)
    grads = [span.backward(hidden, hidden, 0, 4)[0] for span in (native, theirs)]  # by the same weights as before
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 20, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},  # none is shared
        {"intermediate_size": 37, "head_dim": 6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 32},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_variants(checkpoint, monkeypatch, changes):
    source = open_model(str(checkpoint("llama", **changes)))
    native, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    assert is_native(native)
    ours, other = native.open(1, 600), theirs.open(1, 600)
    for number, tokens in enumerate((12, 1, 1, 290, 2, 1)):  # past what the rotary tables begin with
        hidden = hidden_states(1, tokens, number)
        torch.testing.assert_close(native.step(ours, hidden), theirs.step(other, hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2-half-windows"])
@pytest.mark.parametrize("threads", [1, 3])
def test_sessions_that_come_and_go_together(checkpoint, monkeypatch, family, threads):
    source = open_model(str(checkpoint(family)))
    native, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    chance, before = random.Random(1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pairs = []
        for _ in range(25):
            pairs = [pair for pair in pairs if chance.random() < 0.9 and pair[0].position < 80]
            while len(pairs) < 6:
                batch = chance.choice((1, 1, 2))
                pair = native.open(batch, 100), theirs.open(batch, 100)
                hidden = hidden_states(batch, chance.randrange(1, 30), chance.randrange(10**6))
                torch.testing.assert_close(
                    native.step(pair[0], hidden), theirs.step(pair[1], hidden), atol=1e-5, rtol=1e-5
                )
                pairs.append(pair)
            together, right = [], []
            for ours, other in pairs:
                hidden = hidden_states(ours.batch_size, chance.choice((1, 1, 1, 2)), chance.randrange(10**6))
                together.append((native.begin(ours, hidden), 2))
                right.append(theirs.step(other, hidden))
            native.advance(together)
            for (step, _), expected in zip(together, right, strict=True):
                torch.testing.assert_close(step.output(), expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "head_dim": 24,
}  # that four bits take, and a head that is no whole panel


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2-half-windows", "qwen3"])
def test_weights_in_16_bits_and_in_four(checkpoint, monkeypatch, family, dtype, quant):
    """What transformers' code computes in 32 bits with the same weights."""
    monkeypatch.setattr("petals_win.span.native.can_pack", lambda _dtype: False)
    source = open_model(str(checkpoint(family, **SIZES)))
    native, theirs = Span.load(source, 0, 4, dtype=dtype, quant=quant), usual(source, monkeypatch)
    assert is_native(native)
    for ours, other in zip(native._decoder.layers, theirs._decoder.layers, strict=True):
        for name, module in ours.named_modules():
            if isinstance(module, nn.Linear):
                values = module.few_bits.dequantized() if isinstance(module, FewBitsLinear) else module.weight
                other.get_submodule(name).weight = nn.Parameter(values.float(), requires_grad=False)
    ours, other = native.open(2, 60), theirs.open(2, 60)
    most = 1e-5 if dtype is torch.float32 else 0.02
    for number, tokens in enumerate((1, 3, 1, 8, 2, 30, 1, 4)):
        hidden = hidden_states(2, tokens, number, dtype, 128)
        expected = theirs.step(other, hidden.float())
        output = native.step(ours, hidden)
        assert output.dtype is dtype
        assert (output.float() - expected).abs().max() <= most * expected.abs().max()


def test_what_it_is_not_for(checkpoint, monkeypatch):
    monkeypatch.setattr("petals_win.span.native.can_pack", lambda _dtype: True)
    span = Span.load(open_model(str(checkpoint("llama"))), 0, 4, dtype=torch.bfloat16)
    assert not is_native(span) and span._joint.works


def test_kernels_that_compute_something_else_are_not_used(checkpoint, monkeypatch, caplog):
    """Nor for many rows: their layers would keep weights that have become parts of others by then."""
    monkeypatch.setattr(native_room, "_LARGE", 1)
    monkeypatch.setattr(NativeBlocks, "run", lambda self, parts, start, end: [1.01 * part for _, part in parts])
    with caplog.at_level("INFO"):
        span = Span.load(open_model(str(checkpoint("llama"))), 0, 4)
    assert not is_native(span) and span._joint.is_lean and "The kernels are not used" in caplog.text
    assert not any("forward" in vars(module) for layer in span._decoder.layers for module in layer.modules())


def test_long_steps_are_tried_out_too(checkpoint, monkeypatch):
    run = NativeBlocks._run_many
    monkeypatch.setattr(NativeBlocks, "_run_many", lambda self, step, start, end: run(self, step, start, start))
    assert not is_native(Span.load(open_model(str(checkpoint("llama"))), 0, 4))


HEADS = [
    {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},  # none is shared
    {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 46},  # no whole vectors
    {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
    {"num_attention_heads": 200, "num_key_value_heads": 1, "head_dim": 2},  # more than are looked at together
]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "-".join(map(str, heads.values())))
@pytest.mark.parametrize("window", [None, 8, 100])
def test_prompts_in_pieces(checkpoint, monkeypatch, heads, window):
    """In any pieces what transformers computes of the whole; a window is shorter than the prompt, and than a piece."""
    source = open_model(str(checkpoint("mistral", **heads, sliding_window=window, max_position_embeddings=512)))
    native, theirs = Span.load(source, 0, 2), usual(source, monkeypatch, 0, 2)
    assert is_native(native)
    hidden = hidden_states(2, 420, seed=0)
    expected = theirs.step(theirs.open(2, 420), hidden)
    for pieces in ((420,), (17, 1, 130, 64, 128, 80), (300, 2, 118)):
        session = native.open(2, 420, room=200)
        session.room = 420  # keys and values move
        output = torch.cat([native.step(session, piece) for piece in hidden.split(pieces, 1)], 1)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", variants())
def test_prompts_by_every_variant(checkpoint, monkeypatch, name):
    source = open_model(str(checkpoint("mistral", **HEADS[2], sliding_window=50, max_position_embeddings=512)))
    theirs, ours = usual(source, monkeypatch, 0, 2), Kernels(library._folder() / name)
    monkeypatch.setattr(native_room, "kernels", lambda: ours)
    native, hidden = Span.load(source, 0, 2), hidden_states(1, 300, seed=0)
    assert is_native(native)
    outputs = [span.step(span.open(1, 300), hidden) for span in (native, theirs)]
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2-half-windows"])
def test_prompts_of_several_sessions_beside_single_tokens(checkpoint, monkeypatch, family, threads):
    source = open_model(str(checkpoint(family)))
    native, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    chance, before = random.Random(2), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(12):
            batches, pasts = (1, 1, 2, 3, 1), [chance.randrange(1, 40) for _ in range(5)]
            pairs = [(native.open(batch, 240), theirs.open(batch, 240)) for batch in batches]
            steps, right = [], []
            for number, (ours, other) in enumerate(pairs):
                past = hidden_states(ours.batch_size, pasts[number], 100 * turn + number)
                native.step(ours, past)
                theirs.step(other, past)
                tokens = 1 if number < 2 else chance.randrange(2, 200)
                hidden = hidden_states(ours.batch_size, tokens, 100 * turn + 50 + number)
                steps.append((native.begin(ours, hidden), tokens))
                right.append(theirs.step(other, hidden))
            native.advance(steps)
            for (step, _), expected in zip(steps, right, strict=True):
                torch.testing.assert_close(step.output(), expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_a_layer(checkpoint):
    torch.manual_seed(0)
    plain = nn.Linear(48, 301).requires_grad_(False)
    native = NativeLinear.of(plain)
    assert native is not None and native.weight is plain.weight
    for rows in (1, 3, 16, 17, 40):
        inputs = torch.randn(rows, 1, 48)
        torch.testing.assert_close(native(inputs), plain(inputs), atol=1e-5, rtol=1e-5)
    inputs = torch.randn(6, 1, 48, requires_grad=True)
    grads = [torch.autograd.grad(layer(inputs).sum(), inputs)[0] for layer in (native, plain)]
    torch.testing.assert_close(*grads)
    assert native(inputs.detach().double().float()[:0]).shape == (0, 1, 301)
    in_16_bits = NativeLinear.of(plain.to(torch.bfloat16))
    assert (in_16_bits is None) == can_pack(torch.bfloat16)
    for other in (nn.Linear(4, 4), plain.to(torch.float16), nn.Identity()):
        assert NativeLinear.of(other) is None


@pytest.mark.parametrize("large, pays, takes", [(1, True, True), (1, False, False), (2**30, True, False)])
def test_many_rows_where_it_pays(checkpoint, monkeypatch, large, pays, takes):
    """Layers stay the kind that they are, also for passes without a cache, and what is computed of small ones is transformers' to the last bit."""
    source = open_model(str(checkpoint("llama")))
    theirs = usual(source, monkeypatch)
    monkeypatch.setattr(native_room, "_LARGE", large)
    monkeypatch.setattr(native_room, "many_rows_pay", lambda _dtype: pays)
    span, asked = Span.load(source, 0, 4), list[int]()
    linear = native_room.Kernels.linear
    monkeypatch.setattr(
        native_room.Kernels, "linear", lambda self, *args: asked.append(len(args[1])) or linear(self, *args)
    )
    assert {type(each) for each in native_room._linears(span._decoder.layers[0])} == {nn.Linear}
    hidden = hidden_states(1, 30, seed=0)
    assert span._joint.takes_prompts == takes
    steps = [each.step(each.open(1, 40), hidden) for each in (span, theirs)]
    assert not asked
    for outputs in (steps, [each.forward(hidden, 0, 4) for each in (span, theirs)]):
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        assert takes or torch.equal(*outputs)
    assert set(asked) == ({30} if takes else set())


def test_whether_many_rows_pay_is_tried_out(monkeypatch):
    monkeypatch.undo()
    for seconds, pays in ((1.0, True), (3.0, False)):
        native_room.many_rows_pay.cache_clear()
        monkeypatch.setattr(
            native_room,
            "seconds_of",
            lambda layer, _inputs, ours=seconds: 2.0 if isinstance(layer, nn.Linear) else ours,
        )
        assert native_room.many_rows_pay(torch.float32) == pays
    assert not native_room.many_rows_pay(torch.float16)
    native_room.many_rows_pay.cache_clear()


@pytest.mark.parametrize("count, pays, calls", [(11, True, 2), (24, True, 4), (30, True, 1), (30, False, 0)])
def test_more_rows_than_one_call_takes(checkpoint, monkeypatch, count, pays, calls):
    """Some calls of few rows, or one of all; or the other way, where that is faster."""
    monkeypatch.setattr(native_room, "many_rows_pay", lambda _dtype: pays)
    span = Span.load(open_model(str(checkpoint("llama"))), 0, 4)
    run, rows = NativeBlocks.run, list[int]()

    def noted(self, parts, start, end):
        rows.append(sum(hidden.shape[0] * hidden.shape[1] for _, hidden in parts))
        return run(self, parts, start, end)

    batches = [1 + number % 4 for number in range(count)]  # two or three rows of each session on average
    hidden = [hidden_states(batch, 1, seed) for seed, batch in enumerate(batches)]
    alone = [span.step(span.open(batch, 9), step) for batch, step in zip(batches, hidden, strict=True)]
    monkeypatch.setattr(NativeBlocks, "run", noted)
    steps = [span.begin(span.open(batch, 9), step) for batch, step in zip(batches, hidden, strict=True)]
    span.advance([(step, 1) for step in steps])
    assert len(rows) == calls and sum(rows) == (sum(batches) if calls else 0)
    assert calls == 1 or all(each <= MOST_ROWS for each in rows)
    for step, expected in zip(steps, alone, strict=True):
        torch.testing.assert_close(step.output(), expected, atol=1e-5, rtol=1e-5)
