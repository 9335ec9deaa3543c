"""The compiled kernels: every variant computes the same, with as many threads as come, for any sizes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from petals_win.daemon.build import this_target
from petals_win.kernels import library
from petals_win.kernels.build import library_names
from petals_win.kernels.library import BFLOAT16, FLOAT32, GROUP, INT4, INT8, MOST_ROWS, PANEL, Kernels, Linear, kernels

MANY = (17, 29, 101)  # rows, for which weights are laid out anew
ORDER = ("avx2", "avx512")  # a processor that has the later one has those before, too


def variants() -> list[str]:
    mine = library.variant()
    names = library_names(this_target())
    return [
        name for name in names if mine not in ORDER or any(part in name for part in ORDER[: ORDER.index(mine) + 1])
    ]


def layer_of(module: nn.Linear) -> Linear:
    bias = None if module.bias is None else module.bias.data_ptr()
    return Linear(module.weight.data_ptr(), bias, module.out_features, module.in_features, FLOAT32)


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("sizes", [(16, 8), (47, 301), (1, 1), (15, 3), (512, 33), (576, 1537)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_for_any_number_of_rows(name, sizes, bias):
    torch.manual_seed(0)
    ours, plain = Kernels(library._folder() / name), nn.Linear(*sizes, bias=bias).requires_grad_(False)
    for rows in (*range(1, MOST_ROWS + 1), *MANY):
        inputs = torch.randn(rows, sizes[0])
        torch.testing.assert_close(ours.linear(layer_of(plain), inputs), plain(inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", variants())
def test_long_sums_of_many_rows_round_finely(name):
    """As a library's do: one number added after the other would be off by 3e-6."""
    torch.manual_seed(0)
    ours, weight, inputs = Kernels(library._folder() / name), torch.rand(64, 4096), torch.rand(MANY[0], 4096)
    right = inputs.double() @ weight.double().t()
    output = ours.linear(Linear(weight.data_ptr(), None, *weight.shape, FLOAT32), inputs)
    torch.testing.assert_close(output.double(), right, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("sizes", [(16, 8), (47, 301), (576, 1537)], ids=str)
def test_weights_in_16_bits(name, sizes):
    torch.manual_seed(0)
    ours, weight = Kernels(library._folder() / name), torch.randn(sizes[1], sizes[0]).bfloat16()
    layer = Linear(weight.data_ptr(), None, *weight.shape, BFLOAT16)
    for rows in (*range(1, MOST_ROWS + 1), *MANY):
        inputs = torch.randn(rows, sizes[0])
        torch.testing.assert_close(ours.linear(layer, inputs), inputs @ weight.float().t(), atol=1e-4, rtol=1e-5)


def check_panels(ours: Kernels, panels: torch.Tensor, kind: int, columns: torch.Tensor, outputs: int) -> None:
    """That they are unpacked as these columns, and multiplied with as the first outputs of them."""
    for dtype in (torch.float32, torch.bfloat16):
        unpacked = torch.empty_like(columns, dtype=dtype)
        ours.unpack(panels, kind, unpacked)
        assert torch.equal(unpacked, columns.to(dtype))
    layer = Linear(panels.data_ptr(), None, outputs, len(columns), kind)
    for rows in (*range(1, MOST_ROWS + 1), *MANY):
        inputs = torch.randn(rows, len(columns))
        right = inputs @ columns[:, :outputs]
        torch.testing.assert_close(ours.linear(layer, inputs), right, atol=1e-5 * right.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("sizes", [(32, 1), (64, 301), (576, 1537)], ids=str)
def test_weights_in_four_bits(name, sizes):
    """Panels of PANEL outputs, in each of which a value is level * scale + least."""
    torch.manual_seed(0)
    inputs_size, outputs_size = sizes
    ours, count, groups = Kernels(library._folder() / name), -(-outputs_size // PANEL), inputs_size // GROUP
    scales, leasts = torch.rand(2, count, groups, PANEL).half()
    levels = torch.randint(0, 16, (count, groups, GROUP, PANEL), dtype=torch.uint8)
    pairs = levels[:, :, : GROUP // 2] | levels[:, :, GROUP // 2 :] << 4
    kept = [part.contiguous().view(torch.uint8).flatten(2) for part in (scales, leasts, pairs)]
    panels = torch.cat(kept, dim=-1)
    values = (levels * scales[:, :, None].float() + leasts[:, :, None].float()).permute(1, 2, 0, 3)
    columns = values.reshape(inputs_size, -1)
    check_panels(ours, panels, INT4, columns, outputs_size)


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("sizes", [(32, 1), (64, 301), (576, 1537)], ids=str)
def test_weights_in_eight_bits(name, sizes):
    """The same panels, but a value is level * scale, and each half of a group's inputs has scales of its own."""
    torch.manual_seed(0)
    inputs_size, outputs_size = sizes
    ours, count, groups = Kernels(library._folder() / name), -(-outputs_size // PANEL), inputs_size // GROUP
    scales = (torch.rand(count, groups, 2, PANEL) / 64).half()
    levels = torch.randint(-128, 128, (count, groups, GROUP, PANEL), dtype=torch.int8)
    panels = torch.cat([part.view(torch.uint8).flatten(2) for part in (scales, levels)], dim=-1)
    values = levels * scales.float().repeat_interleave(GROUP // 2, 2)
    columns = values.permute(1, 2, 0, 3).reshape(inputs_size, -1)
    check_panels(ours, panels, INT8, columns, outputs_size)


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(32, 1), (64, 301), (608, 70)], ids=str)
def test_weights_are_quantized_to_four_bits(name, dtype, sizes):
    """To the best of 16 equal steps for each group, which are at most a fifteenth of its range; rows that lack become zeros."""
    torch.manual_seed(0)
    inputs_size, outputs_size = sizes
    ours, count = Kernels(library._folder() / name), -(-outputs_size // PANEL) + 3
    weight = torch.randn(outputs_size, inputs_size).to(dtype)
    panels = torch.empty(count, inputs_size // GROUP, (4 + GROUP // 2) * PANEL, dtype=torch.uint8)
    assert ours.quantize(weight, panels)
    columns = torch.empty(inputs_size, count * PANEL)
    ours.unpack(panels, INT4, columns)
    found = columns.t()
    assert not found[outputs_size:].any()
    groups = weight.float().unflatten(1, (-1, GROUP))
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (found[:outputs_size].unflatten(1, (-1, GROUP)) - groups).square().mean(-1).sqrt()
    assert (error <= steps / 12**0.5 * 1.3).all() and error.mean() < 0.98 * steps.mean() / 12**0.5
    for wrong in (torch.nan, torch.inf, -torch.inf, 1e6):
        weight[-1, -1] = wrong
        assert not ours.quantize(weight, panels)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def helpers() -> int:
    return sum(thread.name == "kernels" for thread in threading.enumerate())


def test_threads_that_come_late_or_never_change_nothing(threads):
    ours, plain = kernels(), nn.Linear(64, 500).requires_grad_(False)
    assert ours is not None
    inputs, many = torch.randn(3, 64), torch.randn(40, 64)
    right, right_of_many = plain(inputs), plain(many)
    before = helpers()
    threads(4)
    for _ in range(500):  # each a step that the helpers of the last one may still look at
        torch.testing.assert_close(ours.linear(layer_of(plain), inputs), right, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.linear(layer_of(plain), many), right_of_many, atol=1e-5, rtol=1e-5)
    alone = Kernels(library._folder() / variants()[-1])
    alone._helpers = 50  # most of which there are not
    threads(51)
    torch.testing.assert_close(alone.linear(layer_of(plain), inputs), right, atol=1e-5, rtol=1e-5)
    assert helpers() <= before + 3, "they are made once"


def test_several_callers_at_once(threads):
    ours, plain = kernels(), nn.Linear(64, 2000).requires_grad_(False)
    assert ours is not None
    threads(2)
    inputs = [torch.randn(1 + number, 64) for number in range(8)]

    def many(one: torch.Tensor) -> bool:
        return all(torch.allclose(ours.linear(layer_of(plain), one), plain(one), atol=1e-5) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, inputs))


@pytest.fixture
def anew():
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def test_without_a_library_there_are_none_and_the_log_says_so(anew, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(library, "_folder", lambda: tmp_path)
    with caplog.at_level("INFO"):
        assert kernels() is None
    assert "by torch alone" in caplog.text


def test_a_processor_without_a_variant_has_none(anew, monkeypatch):
    monkeypatch.setattr(library, "this_target", lambda: "linux/amd64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert kernels() is None
