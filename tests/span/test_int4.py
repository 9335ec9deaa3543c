"""Weights in groups of four bits: what they compute, in linear layers, experts and under adapters, on the CPU."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from petals_win.errors import UserError
from petals_win.kernels.library import GROUP
from petals_win.models.source import open_model
from petals_win.span import int4
from petals_win.span.int4 import FewBitsLinear, FewBitsStack, Int4Weight, Tiles, int4_bytes
from petals_win.span.needs import needs_of
from petals_win.span.quantized_linear import quantize_linears
from petals_win.span.rounding import ON_CARD, ON_CPU, Rounding, quantize
from petals_win.span.span import Span

CPU = torch.device("cpu")
SIZES = dict(hidden_size=128, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
# Of hidden states after two blocks of random weights: one layer errs by 0.07. Mixtures send some tokens to other experts.
ERROR = 0.25


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def by_kernels(weight: torch.Tensor) -> torch.Tensor:
    return Int4Weight(weight, CPU).dequantized()


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
    weight = Int4Weight(plain, CPU)
    values = weight.dequantized()
    assert off(values, plain) < 0.08
    for tokens in (1, 3, 8, 64):  # by the kernel, and unpacked
        inputs = torch.randn(2, tokens, columns, dtype=torch.bfloat16)
        expected = inputs.float() @ values.t()
        found = weight.multiply(inputs)
        assert found.shape == expected.shape and found.dtype is torch.bfloat16
        assert off(found, expected) < 0.006
        assert off(weight.multiply(inputs.float()), expected) < 1e-6
    assert weight.nbytes == int4_bytes(rows, columns)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (131, 352), (576, 1536)])
def test_kernels_quantize_as_torch_does(rows, columns, dtype, threads, monkeypatch):
    """The order of sums decides between two that are as good, and now and then which way a search takes."""
    monkeypatch.setattr(int4, "_PIECE", 2**14)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(rows)
        plain = (0.02 * torch.randn(rows, columns)).to(dtype)
        ours, theirs = Int4Weight(plain, CPU).dequantized(), values_of(plain)
        turned = Int4Weight(plain.t().contiguous().t(), CPU).dequantized()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(turned, ours)
    mine, right = ((values - plain).unflatten(1, (-1, GROUP)).norm(dim=-1) for values in (ours, theirs))
    assert ((mine - right).abs() < 0.01 * right).float().mean() >= 0.99
    assert abs(mine.mean() / right.mean() - 1) < 1e-3


# -- on a card, whose operators are not here: what they take and mean, after their source


def columns_of_words(rows: int, columns: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of each of the eight levels of the words [rows / 8, columns / (16 x tiles), 32, tiles / 2, 8]."""
    strip, run, lane, pair = torch.meshgrid(
        *map(torch.arange, (rows // 8, columns // (16 * tiles), 32, tiles // 2)), indexing="ij"
    )
    row = strip * 8 + lane // 4
    first = (run * tiles + 2 * pair) * 16 + 2 * (lane % 4)
    # From the lowest bits on: the even columns of four pairs that lie eight columns apart, then the odd ones.
    steps = torch.tensor([0, 8, 16, 24, 1, 9, 17, 25])
    return row[..., None].expand(*row.shape, 8), first[..., None] + steps


def convert(pairs: torch.Tensor, tiles: int) -> torch.Tensor:
    assert pairs.dtype is torch.uint8 and pairs.ndim == 2 and pairs.is_contiguous()
    rows, columns = pairs.shape[0], 2 * pairs.shape[1]
    assert tiles in (2, 4, 8) and columns % (16 * tiles) == 0 and rows % 8 == 0
    levels = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1).long()
    words = levels[columns_of_words(rows, columns, tiles)] << 4 * torch.arange(8)
    return words.sum(-1).to(torch.int32)


def multiply(inputs: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    assert inputs.dtype is torch.bfloat16 and inputs.ndim == 2 and inputs.is_contiguous() and len(inputs) > 0
    rows, columns, tiles = 8 * packed.shape[0], inputs.shape[1], 2 * packed.shape[3]
    assert packed.dtype is torch.int32 and packed.is_contiguous()
    assert packed.shape == (rows // 8, columns // (16 * tiles), 32, tiles // 2)
    assert group in (32, 64, 128, 256) and columns % group == 0
    assert scales.dtype is torch.bfloat16 and scales.is_contiguous() and scales.shape == (columns // group, rows, 2)
    levels = torch.empty(rows, columns)
    levels[columns_of_words(rows, columns, tiles)] = ((packed[..., None] >> 4 * torch.arange(8)) & 15).float()
    scale, zero = (part.t().repeat_interleave(group, 1).float() for part in scales.unbind(-1))
    values = ((levels - 8) * scale + zero).to(torch.bfloat16)
    return (inputs.float() @ values.float().t()).to(torch.bfloat16)


@pytest.fixture
def card(monkeypatch) -> None:
    """Weights of the CPU are kept as a card would have them."""
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", multiply)
    monkeypatch.setattr(int4, "Panels", Tiles)


@pytest.mark.parametrize(
    ("rows", "columns", "tiles"), [(64, 32, 2), (100, 96, 2), (131, 64, 4), (72, 352, 2), (576, 1536, 8)]
)
@pytest.mark.parametrize("stored", ["by rows", "by columns"])
@pytest.mark.usefixtures("card")
def test_a_card_gets_what_its_kernel_takes(rows, columns, tiles, stored, monkeypatch):
    torch.manual_seed(rows)
    plain = torch.randn(rows, columns) if stored == "by rows" else torch.randn(columns, rows).t()
    monkeypatch.setattr(int4, "_PIECE_ON_CARD", columns * 64)
    monkeypatch.setattr(int4, "_UNPACKED_AT_ONCE", 100)
    weight, values = Int4Weight(plain, CPU), values_of(plain, ON_CARD)
    assert isinstance(weight.kept, Tiles) and weight.kept.packed.shape[3] == tiles // 2
    assert torch.equal(weight.dequantized(), values.to(torch.bfloat16))
    for tokens in (0, 1, 20):
        inputs = torch.randn(tokens, columns)
        found = weight.multiply(inputs)
        assert found.shape == (tokens, rows) and found.dtype is torch.float32
        assert not tokens or off(found, inputs @ values.t()) < 0.01
    assert weight.nbytes == int4_bytes(rows, columns)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt2"])
@pytest.mark.usefixtures("card")
def test_a_span_on_a_card_computes_what_one_on_the_cpu_does(checkpoint, family, monkeypatch):
    """Rounded to other scales; gpt_oss has experts, and gpt2 layers, that are stored the other way round."""
    sizes = {**SIZES, "moe_intermediate_size": 64} if family != "gpt2" else {"hidden_size": 128}
    source = open_model(str(checkpoint(family, **sizes)))
    monkeypatch.setattr("petals_win.span.native.suits", lambda *_: False)
    on_card = Span.load(source, 0, 2, quant="int4")
    monkeypatch.undo()
    plain, on_cpu = Span.load(source, 0, 2), Span.load(source, 0, 2, quant="int4")
    hidden = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(0))
    expected = plain.forward(hidden, 0, 2)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", multiply)
    found = on_card.forward(hidden, 0, 2)
    assert off(found, expected) < ERROR
    assert off(found, on_cpu.forward(hidden, 0, 2)) < 0.8 * off(found, expected)
    assert on_card.weight_bytes == on_cpu.weight_bytes


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without cards")
@pytest.mark.parametrize(("rows", "columns", "tiles"), [(64, 32, 2), (128, 192, 4), (576, 1536, 8)])
def test_torch_agrees_on_the_shapes(rows, columns, tiles):
    with FakeTensorMode():
        cuda = torch.device("cuda", 0)
        levels = torch.zeros(rows, columns, dtype=torch.uint8)
        scales = torch.zeros(rows, columns // GROUP, 2, dtype=torch.bfloat16)
        weight = Tiles(iter([(levels, scales)]), len(levels), cuda)
        assert weight.packed.dtype is torch.int32 and weight.packed.device == cuda
        assert weight.packed.shape == (rows // 8, columns // (16 * tiles), 32, tiles // 2)
        product = weight.multiply(torch.zeros(5, columns, dtype=torch.float16, device=cuda), rows - 3)
        assert product.shape == (5, rows - 3) and product.dtype is torch.bfloat16
        assert weight.dequantized(rows - 3).shape == (rows - 3, columns)


@pytest.mark.parametrize("values", [by_kernels, values_of, functools.partial(values_of, rounding=ON_CARD)])
@pytest.mark.parametrize("offset", [0.0, 0.75])
def test_what_lies_on_16_steps_stays_there(offset, values):
    """As in GGUF's Q4_0, whose levels are on both sides of nothing, and Q4_1 and Q4_K, which have the least one, too."""
    torch.manual_seed(0)
    levels, steps = torch.randint(0, 16, (64, 8, GROUP)), 0.25 * torch.randint(1, 9, (64, 8, 1))
    levels[:, :, 0], levels[:, :, 1] = 0, 15
    levels[:, 1::2] = levels[:, 1::2].clamp(max=13)  # not all levels are there, and the best would be another scale
    plain = ((levels - 8) * steps + offset * steps).flatten(1)
    assert torch.equal(values(plain), plain)


@pytest.mark.parametrize("values", [by_kernels, values_of])
def test_groups_that_are_all_alike(values):
    plain = torch.zeros(64, 64)
    plain[:, 32:] = 0.5
    assert torch.equal(values(plain), plain)


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_values_that_no_scale_stands_for_are_refused(value):
    plain = torch.randn(64, 64)
    plain[3, 40] = value
    for way in (by_kernels, values_of):
        with pytest.raises(UserError, match="Use --quant none"):
            way(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_span_computes_nearly_the_same_in_the_bytes_that_were_planned(checkpoint, family, dtype):
    sizes = {**SIZES, "moe_intermediate_size": 64} if family != "deepseek_v3" else {"hidden_size": 128}
    source = open_model(str(checkpoint(family, **sizes)))
    plain, span = Span.load(source, 1, 3, dtype=dtype), Span.load(source, 1, 3, dtype=dtype, quant="int4")
    layers = [layer for block in span._decoder.layers for layer in block.modules()]
    assert any(isinstance(layer, FewBitsLinear) for layer in layers)
    assert any(isinstance(layer, FewBitsStack) for layer in layers) == (family != "llama")
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
    layer = FewBitsLinear(Int4Weight(plain.weight, CPU), plain.bias, CPU, torch.float32).requires_grad_(False)
    inputs, grad = torch.randn(2, 5, 96, requires_grad=True), torch.randn(2, 5, 100)
    (found,) = torch.autograd.grad(layer(inputs), inputs, grad)
    assert off(found, grad @ by_kernels(plain.weight)) < 0.006


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
    assert block["odd"] is odd and type(block["few"]) is nn.Linear and isinstance(block["even"], FewBitsLinear)
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
    with pytest.raises(TypeError, match="few bits"):
        torch.bmm(torch.randn(1, 2, 64), weight)  # pyright: ignore[reportArgumentType]


def test_where_it_cannot_be_had(monkeypatch):
    assert "not for mps" in int4.why_not(torch.device("mps"))
    assert int4.why_not(CPU) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "7.5, and 8.0 is needed" in int4.why_not(torch.device("cuda", 0))
    monkeypatch.setattr(int4, "kernels", lambda: None)
    assert "no kernels for this processor" in int4.why_not(CPU)
