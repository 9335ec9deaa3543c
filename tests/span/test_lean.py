"""The short way through plain blocks computes what transformers' code does, is taken where it may be, and only for few tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from petals_win.models.source import open_model
from petals_win.span import joint as joint_module
from petals_win.span.lean import LeanBlocks
from petals_win.span.span import FEW_TOKENS, Span
from span.families import FAMILIES

HIDDEN = 64
PLAIN = {"llama", "mistral", "qwen2", "qwen2-half-windows", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
WITH_IMAGES = {"idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "smolvlm"}  # their text


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setattr("petals_win.span.native.kernels", lambda: None)


def whole_span(folder: Path) -> Span:
    source = open_model(str(folder))
    return Span.load(source, 0, source.num_blocks)


def hidden_states(
    batch: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32, width: int = HIDDEN
) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def usual(source, monkeypatch, start: int = 0, end: int = 4, **settings) -> Span:
    with monkeypatch.context() as patch:
        patch.setattr(LeanBlocks, "of", lambda *_, **__: None)
        patch.setattr("petals_win.span.native.kernels", lambda: None)
        return Span.load(source, start, end, **settings)


def test_which_families_take_it(checkpoint):
    lean = {family for family in FAMILIES if whole_span(checkpoint(family))._joint.is_lean}
    assert lean == PLAIN | WITH_IMAGES


@pytest.mark.parametrize("layout", ["by rows", "by columns", "packed"])
@pytest.mark.parametrize("family", sorted(PLAIN))
def test_it_computes_the_same(checkpoint, monkeypatch, family, layout):
    monkeypatch.setattr("petals_win.span.layouts.fastest_layout", lambda *_: layout)
    source = open_model(str(checkpoint(family)))
    lean, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    assert (lean._joint.is_lean, theirs._joint.is_lean) == (True, False)
    assert lean.weight_bytes == theirs.weight_bytes
    chance = random.Random(0)
    for batch, blocks in ((1, (0, 4)), (2, (1, 3))):  # blocks from the middle on, and beams
        ours, other = lean.open(batch, 60, *blocks), theirs.open(batch, 60, *blocks)
        for tokens in (11, 1, 1, 3, 1, 20, 1):  # past the windows of 8 tokens
            hidden = hidden_states(batch, tokens, chance.randrange(10**6))
            torch.testing.assert_close(lean.step(ours, hidden), theirs.step(other, hidden), atol=1e-5, rtol=1e-5)
    hidden = hidden_states(2, 5, seed=1)
    grads = [span.backward(hidden, hidden, 0, 4)[0] for span in (lean, theirs)]  # by the same weights as before
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 20, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},  # none is shared
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"hidden_act": "gelu"},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_variants(checkpoint, monkeypatch, changes):
    source = open_model(str(checkpoint("llama", **changes)))
    lean, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    assert lean._joint.is_lean
    ours, other = lean.open(1, 60), theirs.open(1, 60)
    for number, tokens in enumerate((12, 1, 1)):
        hidden = hidden_states(1, tokens, number)
        torch.testing.assert_close(lean.step(ours, hidden), theirs.step(other, hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}])
def test_in_16_bits_it_rounds_no_worse(checkpoint, monkeypatch, settings):
    source = open_model(str(checkpoint("llama")))
    exact, lean = usual(source, monkeypatch), Span.load(source, 0, 4, **settings)
    theirs = usual(source, monkeypatch, **settings)
    assert lean._joint.is_lean
    errors = []
    for span in (lean, theirs):
        error, sessions = 0.0, [each.open(1, 60) for each in (span, exact)]
        for number in range(30):
            hidden = hidden_states(1, 1, number, settings["dtype"])
            outputs = [each.step(session, hidden) for each, session in zip((span, exact), sessions, strict=True)]
            error += float((outputs[0].float() - outputs[1].float()).norm() / outputs[1].float().norm())
        errors.append(error)
    assert errors[0] <= 1.1 * errors[1]


def test_long_steps_go_the_usual_way(checkpoint, monkeypatch):
    """To the last bit as transformers computes them."""
    source = open_model(str(checkpoint("llama")))
    lean, theirs = Span.load(source, 0, 4), usual(source, monkeypatch)
    ours, other, hidden = lean.open(1, 60), theirs.open(1, 60), hidden_states(1, FEW_TOKENS + 1, seed=0)
    assert torch.equal(lean.step(ours, hidden), theirs.step(other, hidden))


def test_weights_are_not_held_twice(checkpoint):
    span = Span.load(open_model(str(checkpoint("llama"))), 0, 4)
    for layer in span._decoder.layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            modules = [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in names]
            assert len({module.weight.untyped_storage().data_ptr() for module in modules}) == 1


def test_blocks_that_compute_something_else_do_not_take_it(checkpoint, monkeypatch):
    """As would be seen of a type of models whose code changes one day."""
    source = open_model(str(checkpoint("llama")))
    original = LeanBlocks.of

    def wrong(decoder):
        for layer in decoder.layers:
            layer.input_layernorm.register_forward_hook(lambda module, inputs, output: 2 * output)
        return original(decoder)

    monkeypatch.setattr(joint_module.LeanBlocks, "of", wrong)
    span = Span.load(source, 0, 4)
    assert not span._joint.is_lean and span._joint.works
