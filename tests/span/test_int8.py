"""Weights in eight bits: the product is that of the values they stand for, for any number of rows."""

from __future__ import annotations

import pytest
import torch

from petals_win.errors import UserError
from petals_win.models.eight_bits import NEIGHBOURS, Scaled
from petals_win.span import int4, int8
from petals_win.span.int4 import FewBitsLinear
from petals_win.span.int8 import Int8Weight, int8_bytes


def scaled(rows: int, columns: int) -> tuple[Scaled, torch.Tensor]:
    """One whose scales are kept as they are, and its values."""
    torch.manual_seed(rows)
    found = Scaled(
        torch.randint(-128, 128, (rows, columns), dtype=torch.int8),
        (torch.rand(rows, columns // NEIGHBOURS) / 64).half().float(),
    )
    return found, found.levels * found.scale.repeat_interleave(NEIGHBOURS, 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (100, 96), (131, 352), (1537, 576)])
def test_the_product_is_that_of_its_values(rows, columns, monkeypatch):
    monkeypatch.setattr(int4, "_PIECE", 2**14)  # in several pieces, the last of which is no whole panel
    found, values = scaled(rows, columns)
    weight = Int8Weight.of(found)
    assert weight is not None and weight.nbytes == int8_bytes(rows, columns)
    assert torch.equal(weight.dequantized(), values)
    for tokens in (1, 3, 16, 17, 64, 65):  # by the kernel, several times, and unpacked
        inputs = torch.randn(tokens, columns)
        torch.testing.assert_close(weight.multiply(inputs), inputs @ values.t(), atol=1e-4, rtol=1e-5)


def test_as_a_layer():
    found, values = scaled(70, 64)
    weight, bias = Int8Weight.of(found), torch.nn.Parameter(torch.randn(70), requires_grad=False)
    assert weight is not None
    layer = FewBitsLinear(weight, bias, torch.device("cpu"), torch.bfloat16)
    inputs = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = inputs.float() @ values.t() + bias
    outputs = layer(inputs)
    assert outputs.dtype is torch.bfloat16 or outputs.dtype is torch.float32
    assert (outputs.float() - expected).norm() < 0.006 * expected.norm()
    inputs = torch.randn(5, 64, requires_grad=True)
    (mine,) = torch.autograd.grad(layer(inputs).square().sum(), inputs)
    (right,) = torch.autograd.grad((inputs @ values.t() + bias).square().sum(), inputs)
    torch.testing.assert_close(mine, right, atol=1e-2, rtol=1e-4)


def test_what_has_no_place(monkeypatch):
    assert Int8Weight.of(scaled(20, 48)[0]) is None and Int8Weight.of(None) is None
    found, _ = scaled(20, 64)
    with pytest.raises(UserError, match="too large"):
        Int8Weight.of(Scaled(found.levels, found.scale * 1e8))
    monkeypatch.setattr(int8, "kernels", lambda: None)
    assert Int8Weight.of(found) is None
