"""Weights in groups of four bits: what they compute, in linear layers, experts and under adapters, on the CPU."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from petals_win.errors import UserError
from petals_win.kernels.library import GROUP
from petals_win.models.source import open_model
from petals_win.span import int4
from petals_win.span.int4 import ON_CARD, ON_CPU, Int4Linear, Int4Stack, Int4Weight, Rounding, int4_bytes, quantize
from petals_win.span.needs import needs_of
from petals_win.span.quantized_linear import quantize_linears
from petals_win.span.span import Span

CPU = torch.device("cpu")
SIZES = dict(hidden_size=128, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
# Of hidden states after two blocks of random weights: one layer errs by 0.07. Mixtures send some tokens to other experts.
ERROR = 0.25


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def values_of(weight: torch.Tensor, rounding: Rounding = ON_CPU) -> torch.Tensor:
    levels, scales = quantize(weight, rounding)
    groups = (levels.unflatten(1, (-1, GROUP)) - float(rounding.level)) * scales[..., :1].float() + scales[
        ..., 1:
    ].float()
    return groups.flatten(1)


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (100, 96), (131, 352), (576, 1536)])
@pytest.mark.parametrize("multiplies_16_bits", [True, False])
def test_the_product_is_that_of_the_dequantized_weights(rows, columns, multiplies_16_bits, monkeypatch):
    monkeypatch.setattr(int4, "can_pack", lambda _dtype: multiplies_16_bits)
    torch.manual_seed(rows)
    plain = torch.randn(rows, columns)
    weight, values = Int4Weight(plain, CPU), values_of(plain)
    assert off(values, plain) < 0.08
    assert torch.equal(weight.dequantized(), values)
    for tokens in (1, 3, 8, 64):  # by the kernel, and unpacked
        inputs = torch.randn(2, tokens, columns, dtype=torch.bfloat16)
        expected = inputs.float() @ values.t()
        found = weight.multiply(inputs)
        assert found.shape == expected.shape and found.dtype is torch.bfloat16
        assert off(found, expected) < 0.006
        assert off(weight.multiply(inputs.float()), expected) < 1e-6
    assert weight.nbytes == int4_bytes(rows, columns)


@pytest.mark.parametrize("rounding", [ON_CPU, ON_CARD])
@pytest.mark.parametrize("offset", [0.0, 0.75])
def test_what_lies_on_16_steps_stays_there(offset, rounding):
    """As in GGUF's Q4_0, whose levels are on both sides of nothing, and Q4_1 and Q4_K, which have the least one, too."""
    torch.manual_seed(0)
    levels, steps = torch.randint(0, 16, (64, 8, GROUP)), 0.25 * torch.randint(1, 9, (64, 8, 1))
    levels[:, :, 0], levels[:, :, 1] = 0, 15
    levels[:, 1::2] = levels[:, 1::2].clamp(max=13)  # not all levels are there, and the best would be another scale
    plain = ((levels - 8) * steps + offset * steps).flatten(1)
    assert torch.equal(values_of(plain, rounding), plain)


def test_groups_that_are_all_alike():
    plain = torch.zeros(64, 64)
    plain[:, 32:] = 0.5
    assert torch.equal(values_of(plain), plain)


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_values_that_no_scale_stands_for_are_refused(value):
    plain = torch.randn(64, 64)
    plain[3, 40] = value
    with pytest.raises(UserError, match="Use --quant none"):
        Int4Weight(plain, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_span_computes_nearly_the_same_in_the_bytes_that_were_planned(checkpoint, family, dtype):
    sizes = {**SIZES, "moe_intermediate_size": 64} if family != "deepseek_v3" else {"hidden_size": 128}
    source = open_model(str(checkpoint(family, **sizes)))
    plain, span = Span.load(source, 1, 3, dtype=dtype), Span.load(source, 1, 3, dtype=dtype, quant="int4")
    layers = [layer for block in span._decoder.layers for layer in block.modules()]
    assert any(isinstance(layer, Int4Linear) for layer in layers)
    assert any(isinstance(layer, Int4Stack) for layer in layers) == (family != "llama")
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 128, dtype=dtype)
    whole = span.forward(hidden, 1, 3)
    assert off(whole, plain.forward(hidden, 1, 3)) < ERROR
    session = span.open(2, 16)
    steps = [span.step(session, hidden[:, :4]), *(span.step(session, hidden[:, i : i + 1]) for i in range(4, 7))]
    assert off(torch.cat(steps, dim=1), whole) < 0.05
    assert span.weight_bytes == sum(needs_of(source.config, dtype, "int4").block_bytes[1:3]) < plain.weight_bytes


def test_gradients_are_those_of_the_dequantized_weights():
    torch.manual_seed(0)
    plain = nn.Linear(96, 100)
    layer = Int4Linear(Int4Weight(plain.weight, CPU), plain.bias, CPU, torch.float32).requires_grad_(False)
    inputs, grad = torch.randn(2, 5, 96, requires_grad=True), torch.randn(2, 5, 100)
    (found,) = torch.autograd.grad(layer(inputs), inputs, grad)
    assert off(found, grad @ values_of(plain.weight)) < 0.006


def test_gradients_pass_through_a_span(checkpoint):
    source = open_model(str(checkpoint("mixtral", **SIZES)))
    plain, span = Span.load(source, 0, 1), Span.load(source, 0, 1, quant="int4")
    torch.manual_seed(0)
    hidden, grad = torch.randn(1, 5, 128), torch.randn(1, 5, 128)
    expected, _ = plain.backward(hidden, grad, 0, 1)
    assert off(span.backward(hidden, grad, 0, 1)[0], expected) < 2 * ERROR


def test_conv1d_of_gpt2(checkpoint):
    source = open_model(str(checkpoint("gpt2", hidden_size=128)))
    plain, span = Span.load(source, 0, 1), Span.load(source, 0, 1, quant="int4")
    hidden = torch.randn(1, 5, 128)
    assert off(span.forward(hidden, 0, 1), plain.forward(hidden, 0, 1)) < ERROR
    assert span.weight_bytes == needs_of(source.config, torch.float32, "int4").block_bytes[0] < plain.weight_bytes


def test_a_shape_without_groups_stays_as_it_is_and_is_named(caplog):
    block = nn.ModuleDict({"odd": nn.Linear(1025, 1024), "few": nn.Linear(1024, 8), "even": nn.Linear(1024, 1024)})
    odd = block["odd"]
    with caplog.at_level(logging.INFO, "petals_win"):
        quantize_linears(block, "int4", CPU, torch.float32)
    assert block["odd"] is odd and type(block["few"]) is nn.Linear and isinstance(block["even"], Int4Linear)
    assert [record.getMessage() for record in caplog.records if "stays" in record.getMessage()] == [
        "odd.weight [1024, 1025] stays in 16 bits: int4 takes no such weight"
    ]


def test_adapters_add_to_it_what_they_add_to_plain_weights(checkpoint, tmp_path):
    source = open_model(str(checkpoint("llama", **SIZES)))
    torch.manual_seed(0)
    options = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(source.whole_model(), options).save_pretrained(tmp_path / "lora")
    name = str(tmp_path / "lora")
    plain = Span.load(source, 0, 2, adapters=[name])
    span = Span.load(source, 0, 2, quant="int4", adapters=[name])
    hidden = torch.randn(1, 5, 128)
    with_it, without = span.forward(hidden, 0, 2, adapter=name), span.forward(hidden, 0, 2)
    assert off(with_it, plain.forward(hidden, 0, 2, adapter=name)) < ERROR
    assert torch.equal(without, Span.load(source, 0, 2, quant="int4").forward(hidden, 0, 2))
    assert off(with_it, plain.forward(hidden, 0, 2)) > 2 * off(with_it, plain.forward(hidden, 0, 2, adapter=name))


def test_a_use_that_is_not_known_is_an_error():
    weight = Int4Weight(torch.randn(64, 64), CPU)
    with pytest.raises(TypeError, match="four bits"):
        torch.bmm(torch.randn(1, 2, 64), weight)  # pyright: ignore[reportArgumentType]


def test_where_it_cannot_be_had(monkeypatch):
    assert "not for mps" in int4.why_not(torch.device("mps"))
    assert int4.why_not(CPU) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "7.5, and 8.0 is needed" in int4.why_not(torch.device("cuda", 0))
    monkeypatch.setattr(int4, "kernels", lambda: None)
    assert "no kernels for this processor" in int4.why_not(CPU)
