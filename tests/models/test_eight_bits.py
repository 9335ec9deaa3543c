"""Weights that a GGUF file has in six or eight bits: numbers and scales are those of the file."""

from __future__ import annotations

import pytest
import torch
from gguf import GGML_QUANT_SIZES, dequantize

from models.test_gguf_types import stored
from petals_win.models.eight_bits import GGUF_TYPES, NEIGHBOURS, Scaled


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: kind.name)
def test_blocks_are_unpacked_as_the_gguf_package_does(kind):
    data = stored(kind, 24, 512)
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    levels, scale = (torch.from_numpy(array) for array in GGUF_TYPES[kind](blocks))
    found = Scaled(levels, scale)
    wanted = torch.from_numpy(dequantize(data, kind).reshape(24, 512))
    values = (found.levels * found.scale.repeat_interleave(NEIGHBOURS, 1)).view(24, 512)
    assert levels.dtype is torch.int8 and levels.min() < -20 and levels.max() > 20
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
