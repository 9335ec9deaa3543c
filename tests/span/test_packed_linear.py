"""Packed linear layers compute what plain ones do, and take no more memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petals_win.models.source import open_model
from petals_win.span import layouts, packed_linear
from petals_win.span.layouts import lay_out_linears
from petals_win.span.packed_linear import PackedLinear, packed_if_possible
from petals_win.span.span import Span
from span.equal_spans import assert_equal_within_rounding


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setattr("petals_win.span.native.kernels", lambda: None)


needs_packing = pytest.mark.skipif(
    not packed_linear.can_pack(torch.float32), reason="this torch or processor has no oneDNN to pack weights for"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def no_cached_answer():
    packed_linear.can_pack.cache_clear()
    yield
    packed_linear.can_pack.cache_clear()


@pytest.fixture
def always_packed(monkeypatch):
    monkeypatch.setattr(layouts, "fastest_layout", lambda rows, columns, dtype: "packed")


def frozen(layer: nn.Module, dtype=torch.float32) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 1, 48), (2, 7, 48), (40, 48), (48,)])
def test_equal_to_a_plain_layer(dtype, bias, shape):
    if not packed_linear.can_pack(dtype):
        pytest.skip(f"this processor has no instructions for {dtype}")
    torch.manual_seed(0)
    plain = frozen(nn.Linear(48, 80, bias=bias), dtype)
    packed = packed_if_possible(plain)
    assert isinstance(packed, PackedLinear)
    inputs = torch.randn(shape, dtype=dtype)
    expected, actual = plain(inputs), packed(inputs)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@needs_packing
def test_gpt2_s_own_kind_of_linear_layer():
    torch.manual_seed(0)
    plain = frozen(Conv1D(80, 48))
    packed = packed_if_possible(plain)
    assert isinstance(packed, PackedLinear)
    inputs = torch.randn(2, 5, 48)
    assert (packed(inputs) - plain(inputs)).abs().max() <= 1e-4


@needs_packing
def test_gradients_of_the_inputs():
    torch.manual_seed(0)
    plain = frozen(nn.Linear(48, 80))
    packed = packed_if_possible(plain)
    ours, theirs = (torch.ones(2, 5, 48).requires_grad_() for _ in range(2))
    weights = torch.randn(2, 5, 80)
    (packed(ours) * weights).sum().backward()
    (plain(theirs) * weights).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-4
    with torch.inference_mode():
        assert torch.equal(packed(ours), packed(ours.detach()))


def test_what_is_not_packed():
    trained, half = nn.Linear(4, 4), frozen(nn.Linear(4, 4), torch.float16)
    meta = nn.Linear(4, 4, device="meta").requires_grad_(False)
    other = frozen(nn.Bilinear(2, 2, 2))

    class Special(nn.Linear):
        """A layer with its own forward."""

    for layer in (trained, half, meta, other, frozen(Special(4, 4))):
        assert packed_if_possible(layer) is layer


def test_without_the_operators_layers_stay_as_they_are(monkeypatch, no_cached_answer):
    def missing(weight):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(packed_linear, "_pack", missing)
    layer = frozen(nn.Linear(4, 4))
    assert packed_if_possible(layer) is layer


@needs_packing
def test_operators_that_compute_something_else_are_not_used(monkeypatch, no_cached_answer):
    monkeypatch.setattr(packed_linear, "_multiply", lambda inputs, weight, bias: inputs * 3)
    layer = frozen(nn.Linear(4, 4))
    assert packed_if_possible(layer) is layer


@needs_packing
def test_all_layers_below_and_no_plain_weight_left(always_packed):
    module = nn.Sequential(frozen(nn.Linear(8, 8)), nn.Sequential(nn.ReLU(), frozen(nn.Linear(8, 4))))
    assert lay_out_linears([module]) == 2
    assert sum(parameter.numel() for parameter in module.parameters()) == 8 + 4, "the biases"
    gc.collect()
    assert [type(child).__name__ for child in (module[0], module[1][1])] == ["PackedLinear"] * 2
    assert lay_out_linears([module]) == 0, "nothing twice"


@needs_packing
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_packed_span_is_equal_within_rounding(checkpoint, family, always_packed, monkeypatch):
    source = open_model(str(checkpoint(family)))
    packed = Span.load(source, 0, 3)
    assert any(isinstance(module, PackedLinear) for layer in packed._decoder.layers for module in layer.modules())
    monkeypatch.setattr("petals_win.span.filling.lay_out_linears", lambda modules: 0)
    plain = Span.load(source, 0, 3)
    assert_equal_within_rounding(packed, plain)
