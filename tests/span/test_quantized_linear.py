"""Spans whose weights are kept in 4 or 8 bits by bitsandbytes, on the CPU."""

from __future__ import annotations

import pytest
import torch

from petals_win.errors import UserError
from petals_win.models.source import open_model
from petals_win.span import int4, quantized_linear
from petals_win.span.choices import choose_quant
from petals_win.span.needs import needs_of
from petals_win.span.quantized_linear import check_quantizes
from petals_win.span.span import Span

# Of hidden states after two blocks of random weights. bitsandbytes itself errs by about 0.09 and 0.005 in one layer.
ERRORS = {"nf4": 0.25, "int8": 0.05}
SIZES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("quant", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_span_computes_nearly_the_same_in_fewer_bytes(checkpoint, quant, dtype):
    source = open_model(str(checkpoint("llama", **SIZES)))
    plain = Span.load(source, 0, 2, dtype=dtype)
    span = Span.load(source, 0, 2, dtype=dtype, quant=quant)
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 256, dtype=dtype)

    expected = plain.forward(hidden, 0, 2).float()
    assert relative_error(span.forward(hidden, 0, 2).float(), expected) < ERRORS[quant]
    session = span.open(2, 16)
    steps = [span.step(session, hidden[:, :4]), *(span.step(session, hidden[:, i : i + 1]) for i in range(4, 7))]
    assert relative_error(torch.cat(steps, dim=1).float(), expected) < ERRORS[quant]

    needed = sum(needs_of(source.config, dtype, quant).block_bytes[:2])
    assert abs(span.weight_bytes - needed) < 0.02 * needed < 0.6 * plain.weight_bytes


@pytest.mark.parametrize("quant", ERRORS)
def test_gradients_pass_through(checkpoint, quant):
    source = open_model(str(checkpoint("llama", **SIZES)))
    plain, span = Span.load(source, 0, 2), Span.load(source, 0, 2, quant=quant)
    torch.manual_seed(0)
    hidden, grad = torch.randn(1, 5, 256), torch.randn(1, 5, 256)
    expected, _ = plain.backward(hidden, grad, 0, 2)
    actual, _ = span.backward(hidden, grad, 0, 2)
    assert relative_error(actual, expected) < 2 * ERRORS[quant]


@pytest.mark.parametrize("quant", ERRORS)
def test_conv1d_of_gpt2(checkpoint, quant):
    source = open_model(str(checkpoint("gpt2", hidden_size=256)))
    plain, span = Span.load(source, 0, 1), Span.load(source, 0, 1, quant=quant)
    hidden = torch.randn(1, 5, 256)
    assert relative_error(span.forward(hidden, 0, 1), plain.forward(hidden, 0, 1)) < ERRORS[quant]
    needed = needs_of(source.config, torch.float32, quant).block_bytes[0]
    assert abs(span.weight_bytes - needed) < 0.02 * needed < 0.4 * plain.weight_bytes


def test_what_cannot_be_quantized_is_refused(monkeypatch):
    check_quantizes("none", torch.device("mps"))
    with pytest.raises(UserError, match="for NVIDIA GPUs, not for mps"):
        check_quantizes("nf4", torch.device("mps"))
    with pytest.raises(UserError, match="int4 cannot be had here"):
        check_quantizes("int4", torch.device("mps"))
    check_quantizes("int8", torch.device("cuda"))
    monkeypatch.setattr(quantized_linear, "is_installed", lambda: False)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_quantizes("int8", torch.device("cuda"))


@pytest.mark.parametrize("quant", ERRORS)
def test_what_is_many_times_slower_on_a_cpu_is_refused_and_the_fast_one_named(quant, monkeypatch):
    with pytest.raises(UserError, match="slower than 16 bits. Use --quant int4"):
        choose_quant(quant, torch.device("cpu"))
    assert choose_quant("int4", torch.device("cpu"), adapters=True) == "int4"
    monkeypatch.setattr(int4, "kernels", lambda: None)
    with pytest.raises(UserError, match="slower than 16 bits. Use --quant none"):
        choose_quant(quant, torch.device("cpu"))
