"""A head that a file has in eight bits stays so, and gives the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from models.gguf_writer import write_quantized

from petals_win.client.hollow import hollow_model
from petals_win.models.source import open_model
from petals_win.span.int4 import FewBitsLinear

Q4_1, Q6_K, Q8_0 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0
WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4)


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "off"), [(Q8_0, 1e-5), (Q6_K, 1e-3)], ids=lambda value: getattr(value, "name", ""))
@torch.no_grad()
def test_the_same_logits(checkpoint, tmp_path, tied, kind, off):
    """Scales of Q6_K are products, which are rounded to 16 bits."""
    model = open_model(str(checkpoint("llama", **WIDE, tie_word_embeddings=tied))).whole_model()
    file = write_quantized(model, tmp_path / "model.gguf", Q4_1, {"token_embd": kind, "output": kind})
    source = open_model(str(file))
    whole, ours = source.whole_model(torch.float32), hollow_model(source, torch.nn.Identity(), dtype=torch.float32)
    plain, head = whole.get_output_embeddings(), ours.get_output_embeddings()
    assert isinstance(head, FewBitsLinear)
    for rows in (1, 5, 16, 33, 100):
        hidden = torch.randn(rows, 256)
        expected = plain(hidden)
        assert (head(hidden) - expected).norm() < off * expected.norm()
    assert torch.equal(ours.get_input_embeddings().weight, whole.get_input_embeddings().weight)


def test_of_other_files_it_stays_as_it_is(checkpoint, tmp_path):
    folder = checkpoint("llama", **WIDE)
    file = write_quantized(open_model(str(folder)).whole_model(), tmp_path / "model.gguf", Q4_1)
    for path in (folder, file):
        model = hollow_model(open_model(str(path)), torch.nn.Identity())
        assert not isinstance(model.get_output_embeddings(), FewBitsLinear)
