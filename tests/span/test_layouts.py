"""Weights lie as the processor computes with them fastest, and compute the same wherever they lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petals_win.models.source import open_model
from petals_win.span import layouts
from petals_win.span.layouts import fastest_layout, lay_out, lay_out_linears
from petals_win.span.span import Span
from span.equal_spans import assert_equal_within_rounding


@pytest.fixture
def lie(monkeypatch):
    """Let all weights lie in one way."""

    def choose(layout: str) -> None:
        monkeypatch.setattr(layouts, "fastest_layout", lambda rows, columns, dtype: layout)

    return choose


def frozen(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kind", [lambda: nn.Linear(48, 80), lambda: Conv1D(80, 48)])
def test_either_kind_lies_either_way_and_computes_the_same(kind, lie):
    plain, layer = frozen(kind()), frozen(kind())
    inputs = torch.randn(3, 5, 48)
    for layout, by_columns in (("by columns", True), ("by rows", False), ("by rows", False)):
        lie(layout)
        assert lay_out(layer) is layer
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        assert weight.shape == (80, 48) and weight.stride() == ((1, 80) if by_columns else (48, 1))
        assert not layer.weight.requires_grad
        assert torch.allclose(layer(inputs), plain(inputs), atol=1e-4)


def test_a_weight_that_lies_well_is_not_copied(lie):
    layer = frozen(nn.Linear(8, 4))
    weight = layer.weight
    lie("by rows")
    assert lay_out_linears([nn.Sequential(layer)]) == 0
    assert layer.weight is weight


def test_what_is_trained_or_unknown_stays(lie):
    lie("by columns")
    for layer in (nn.Linear(8, 4), nn.ReLU(), nn.Linear(8, 4, device="meta").requires_grad_(False)):
        before = getattr(layer, "weight", None)
        assert lay_out(layer) is layer and getattr(layer, "weight", None) is before


@pytest.mark.parametrize(
    ("took", "fastest"),
    [
        ({"by rows": (1.0, 8.0), "by columns": (1.05, 4.0)}, "by columns"),
        ({"by rows": (1.0, 8.0), "packed": (1.5, 4.0)}, "by rows"),
        ({"by rows": (1.0, 3.0), "packed": (0.9, 3.3)}, "packed"),
    ],
)
def test_one_token_counts_more_than_several(took, fastest, monkeypatch):
    monkeypatch.setattr(layouts, "seconds_of", lambda layer, inputs: took[layer][inputs.shape[1] > 1])
    assert layouts._fastest({name: [name] for name in took}, 4, torch.float32) == fastest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_tried_out_whatever_the_size(dtype):
    layouts._tried.cache_clear()
    assert fastest_layout(3, 5, dtype) in ("by rows", "by columns", "packed")
    assert fastest_layout(10**6, 64, dtype) == fastest_layout(
        10**7, 64, dtype
    ), "weights of 2.5 GB are not made for it"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_moe", "deepseek_v3"])
def test_a_span_by_columns_is_equal_within_rounding(checkpoint, family, lie, monkeypatch):
    source = open_model(str(checkpoint(family)))
    lie("by columns")
    turned = Span.load(source, 0, 3)
    monkeypatch.setattr("petals_win.span.filling.lay_out_linears", lambda modules: 0)
    plain = Span.load(source, 0, 3)
    assert_equal_within_rounding(turned, plain)
