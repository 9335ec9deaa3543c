"""Which dtype a span is computed in where nobody said, by the checkpoint's and by what the device is fast with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petals_win.span import choices
from petals_win.span.choices import choose_dtype, choose_quant, lacks_bitsandbytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def chosen(stored: torch.dtype, device: torch.device) -> torch.dtype:
    source: Any = SimpleNamespace(dtype=stored, is_quantized_gguf=False)
    return choose_dtype(None, source, device)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_on_a_cpu(stored, expected):
    assert chosen(stored, CPU) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_card_of_before_2020_has_no_fast_bfloat16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert chosen(torch.bfloat16, CUDA) is expected
    assert chosen(torch.float16, CUDA) is torch.float16 and chosen(torch.float32, CUDA) is torch.float32


def test_a_quantized_gguf_is_in_32_bits_on_a_cpu_only(monkeypatch):
    """Whether it is so there its size says."""
    source: Any = SimpleNamespace(dtype=torch.float32, is_quantized_gguf=True)
    assert choose_dtype(None, source, CPU) is torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert choose_dtype(None, source, CUDA) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert choose_dtype(None, source, CUDA) is torch.float16
    assert choose_dtype("float32", source, CUDA) is torch.float32


def test_a_small_model_stays_in_16_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    for gib, expected in ((5.9, "none"), (6.1, "int4")):
        monkeypatch.setattr(choices, "model_bytes", lambda *_, gib=gib: gib * 2**30)
        source: Any = SimpleNamespace(in_few_bits={}, config=None)
        assert choose_quant(None, CUDA, source=source) == expected


@pytest.mark.parametrize(
    ("capability", "installed", "adapters", "expected"),
    [
        ((8, 0), False, False, "int4"),
        ((12, 0), True, True, "int4"),
        ((7, 5), True, False, "int8"),
        ((7, 5), False, False, "none"),
        ((7, 5), True, True, "none"),
        ((7, 0), True, False, "none"),
    ],
)
def test_a_card_keeps_weights_in_the_smallest_form_that_is_nearly_as_good_as_16_bits(
    monkeypatch, capability, installed, adapters, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(choices, "is_installed", lambda: installed)
    monkeypatch.setattr(choices, "model_bytes", lambda *_: 2**40)
    source: Any = SimpleNamespace(in_few_bits={}, config=None)
    assert choose_quant(None, CUDA, adapters, source) == expected
    assert lacks_bitsandbytes(CUDA) == (capability == (7, 5) and not installed)
    assert choose_quant(None, CPU, adapters, source) == "none"


def test_nf4_is_there_for_whoever_asks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    assert choose_quant("nf4", CUDA) == "nf4"
