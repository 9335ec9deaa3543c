"""Weights that a GGUF file has in four bits: which they are, and that their levels are those of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from models.gguf_writer import write_quantized
from models.test_gguf_types import stored
from petals_win.models.four_bits import GGUF_TYPES, GROUP, Groups, groups_of
from petals_win.models.source import ModelSource, open_model

Q4_0, Q4_1, Q4_K = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q4_K
Q6_K, Q8_0 = GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0
# Rows of all matrices hold blocks of any type, and are enough for int4.
WIDE = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_attention_heads=4)


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


@pytest.fixture
def in_kind(checkpoint, tmp_path):
    """Makes a file whose blocks have matrices of one type, but for those whose names have another one in `but`."""

    def make(
        family: str, kind: GGMLQuantizationType, but: dict[str, GGMLQuantizationType] | None = None
    ) -> ModelSource:
        model = open_model(str(checkpoint(family, **WIDE))).whole_model()
        return open_model(str(write_quantized(model, tmp_path / f"{family}-{kind.name}.gguf", kind, but)))

    return make


def plain(groups: Groups) -> torch.Tensor:
    levels = groups.levels.unflatten(-1, (-1, GROUP)).float()
    return (levels * groups.scale.unsqueeze(-1) + groups.least.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: kind.name)
def test_blocks_are_unpacked_as_the_gguf_package_does(kind):
    data = stored(kind, 24, 512)
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    levels, scale, least = (torch.from_numpy(array) for array in GGUF_TYPES[kind](blocks))
    found = plain(Groups(levels, scale, least)).view(24, 512)
    wanted = torch.from_numpy(dequantize(data, kind).reshape(24, 512))
    assert levels.max() == 15 and levels.min() == 0
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


FAMILIES = ["phi3", "smollm3", "granite", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in GGUF_TYPES), *((family, Q4_1) for family in FAMILIES)]
)
def test_levels_go_where_the_values_of_their_weight_go(in_kind, family, kind):
    """Rows of queries and keys in pairs, parts of one tensor, experts of several."""
    source = in_kind(family, kind)
    model = source.whole_model(torch.float32)
    tensors = source.checkpoint.tensors(model)
    wanted = {
        name
        for name, parameter in model.named_parameters()
        if ".layers." in name or ".h." in name
        if parameter.ndim > 1 and parameter.shape[-1] % 256 == 0
    }
    assert wanted and source.in_few_bits.keys() >= {
        name for name in wanted if "proj" in name or "query_key_value" in name
    }
    for name in source.in_few_bits:
        groups = groups_of(tensors[name])
        wanted_of = model.get_parameter(name)
        assert groups is not None and groups.shape == wanted_of.shape
        experts = [groups[index] for index in range(len(wanted_of))] if wanted_of.ndim > 2 else [groups]
        for expert, values in zip(experts, wanted_of if wanted_of.ndim > 2 else [wanted_of], strict=True):
            pieces = [plain(expert[start : start + 96]) for start in range(0, len(values), 96)]
            torch.testing.assert_close(torch.cat(pieces), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "bloom", "deepseek_v3"])
def test_what_lies_the_other_way_round_is_left_out(in_kind, family):
    source = in_kind(family, Q4_0)
    left_out = {"gpt2": "", "gpt_oss": "experts", "bloom": "query_key_value", "deepseek_v3": "kv_b_proj"}[family]
    assert not [name for name in source.in_few_bits if left_out in name]
    assert bool(source.in_few_bits) == (family in ("bloom", "deepseek_v3"))


def test_only_where_they_are_most(in_kind):
    mixed = in_kind("llama", Q4_K, {"ffn_down": Q6_K, "attn_v": Q6_K})
    found = {name.rsplit(".", 2)[1]: bits for name, bits in mixed.in_few_bits.items()}
    in_four = dict.fromkeys(("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"), 4)
    assert found == {**in_four, "down_proj": 8, "v_proj": 8}
    assert {name.rsplit(".", 2)[1]: bits for name, bits in mixed.in_few_bits_on("cuda").items()} == in_four
    few = {"ffn_down": Q4_1, "attn_v": Q4_1}
    assert in_kind("llama", Q8_0, few).in_few_bits == {}
