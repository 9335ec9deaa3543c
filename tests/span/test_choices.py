"""Which dtype a span is computed in where nobody said, by the checkpoint's and by what the device is fast with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petals_win.span.choices import choose_dtype

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
