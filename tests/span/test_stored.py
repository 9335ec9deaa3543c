"""Files of four bits served as they are: what is computed is that of their own dequantized weights, in the bytes that were planned."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from loading_memory import taken_by_loading
from models.gguf_writer import write_quantized
from models.test_gguf_types import write_large
from torch import nn

from petals_win.errors import UserError
from petals_win.models.four_bits import Groups
from petals_win.models.gguf_file import GgufCheckpoint
from petals_win.models.source import DEFAULT_MODEL, ModelSource, open_model
from petals_win.span import int4
from petals_win.span.choices import choose_quant
from petals_win.span.int4 import FewBitsLinear, FewBitsStack, Int4Weight
from petals_win.span.int8 import Int8Weight
from petals_win.span.needs import needs_of
from petals_win.span.rounding import ON_CARD, take_over
from petals_win.span.span import Span

CPU = torch.device("cpu")
PROSE = Path(__file__).resolve().parents[1] / "data" / "prose.txt"
Q4_0, Q4_1, Q4_K = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q4_K
Q5_0, Q6_K, Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0
WIDE = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_attention_heads=4)
# Of hidden states: nothing but the order of sums where scales are of 16 bits in the file, too.
ERRORS = {Q4_0: 1e-5, Q4_1: 1e-5, Q4_K: 1e-3}


@pytest.fixture
def file_of(checkpoint, tmp_path, home):
    """Makes a file whose blocks' matrices are of one type, but for those whose names have another one in `but`."""

    def make(family: str, kind: Any, but: dict[str, Any] | None = None) -> ModelSource:
        model = open_model(str(checkpoint(family, **WIDE))).whole_model()
        return open_model(str(write_quantized(model, tmp_path / f"{family}.gguf", kind, but)))

    return make


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_it_computes_with_the_levels_of_the_file(file_of, family, kind):
    source = file_of(family, kind)
    plain, span = Span.load(source, 1, 3), Span.load(source, 1, 3, quant="int4")
    kinds = {type(module) for layer in span._decoder.layers for module in layer.modules()}
    assert FewBitsLinear in kinds and (FewBitsStack in kinds) == (family != "llama")
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, source.hidden_size)
    wanted = plain.forward(hidden, 1, 3)
    assert off(span.forward(hidden, 1, 3), wanted) < ERRORS[kind]
    session = span.open(2, 24)
    steps = [span.step(session, hidden[:, :17]), *(span.step(session, hidden[:, i : i + 1]) for i in range(17, 20))]
    assert off(torch.cat(steps, dim=1), wanted) < ERRORS[kind]
    planned = needs_of(source.config, span.dtype, "int4", source.in_few_bits).block_bytes[1:3]
    assert span.weight_bytes == sum(planned) < 0.3 * plain.weight_bytes


def test_what_the_file_has_in_six_bits_takes_eight(file_of):
    """As in a Q4_K_M file, which has some matrices in Q6_K; queries are such whose rows are moved about."""
    source = file_of("llama", Q4_K, {"ffn_down": Q6_K, "attn_v": Q6_K, "attn_q": Q6_K})
    plain, span = (Span.load(source, 1, 3, quant=quant) for quant in ("none", "int4"))
    for ours, theirs in zip(span._decoder.layers, plain._decoder.layers, strict=True):
        for name in ("mlp.down_proj", "self_attn.v_proj", "self_attn.q_proj"):
            layer: Any = ours.get_submodule(name)
            assert isinstance(layer.few_bits, Int8Weight)
            assert off(layer.few_bits.dequantized(), theirs.get_parameter(f"{name}.weight")) < 1e-3
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, source.hidden_size)
    # Random levels of six bits make attention so sharp that it enlarges what the rounding of scales does.
    assert off(span.forward(hidden, 1, 3), plain.forward(hidden, 1, 3)) < 1e-2
    planned = needs_of(source.config, span.dtype, "int4", source.in_few_bits_on("cpu")).block_bytes[1:3]
    assert span.weight_bytes == sum(planned)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_the_file_has_in_six_bits_take_eight(file_of, family):
    source = file_of(family, Q4_K, {"ffn_down_exps": Q6_K})
    plain, span = (Span.load(source, 1, 3, quant=quant) for quant in ("none", "int4"))
    for ours, theirs in zip(span._decoder.layers, plain._decoder.layers, strict=True):
        found, wanted = cast(tuple[Any, Any], [layer.get_submodule("mlp.experts") for layer in (ours, theirs)])
        assert isinstance(found.down_proj, FewBitsStack) and isinstance(found.gate_up_proj, FewBitsStack)
        for expert, weight in enumerate(wanted.down_proj):
            assert isinstance(one := found.down_proj[expert], Int8Weight)
            assert off(one.dequantized(), weight) < 1e-3
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, source.hidden_size)
    assert off(span.forward(hidden, 1, 3), plain.forward(hidden, 1, 3)) < 1e-2
    planned = needs_of(source.config, span.dtype, "int4", source.in_few_bits_on("cpu")).block_bytes[1:3]
    assert span.weight_bytes == sum(planned)


def test_what_the_file_has_in_other_bits_stays_as_it_is(file_of):
    source = file_of("llama", Q4_K, {"ffn_down": Q5_0, "attn_v": Q5_0})
    plain, span = (Span.load(source, 1, 3, dtype=torch.bfloat16, quant=quant) for quant in ("none", "int4"))
    ours: Any
    for ours, theirs in zip(span._decoder.layers, plain._decoder.layers, strict=True):
        assert isinstance(ours.mlp.up_proj, FewBitsLinear) and isinstance(ours.self_attn.k_proj, FewBitsLinear)
        for name in ("mlp.down_proj", "self_attn.v_proj"):
            layer: Any = ours.get_submodule(name)
            assert not isinstance(layer, FewBitsLinear)
            inputs = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
            assert torch.equal(layer(inputs), theirs.get_submodule(name)(inputs))
    planned = needs_of(source.config, torch.bfloat16, "int4", source.in_few_bits).block_bytes[1:3]
    assert span.weight_bytes == sum(planned)


def test_others_are_quantized_when_somebody_asks_for_it(file_of):
    source = file_of("llama", Q8_0)
    assert choose_quant(None, CPU, source=source) == "none"
    span = Span.load(source, 1, 2, quant="int4")
    assert {type(module) for module in span._decoder.layers[0].modules() if isinstance(module, nn.Linear)} == {
        FewBitsLinear
    }
    assert span.weight_bytes == needs_of(source.config, span.dtype, "int4", source.in_few_bits).block_bytes[1]


def test_it_is_the_default_and_says_so(file_of, monkeypatch, caplog):
    source = file_of("llama", Q4_0)
    with caplog.at_level(logging.INFO, "petals_win"):
        assert choose_quant(None, CPU, source=source) == "int4"
        assert choose_quant("none", CPU, source=source) == "none"
        monkeypatch.setattr(int4, "kernels", lambda: None)
        assert choose_quant(None, CPU, source=source) == "none"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
        assert choose_quant(None, torch.device("cuda", 0), source=source) == "int4"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
        assert choose_quant(None, torch.device("cuda", 0), source=source) == "none"
    said = [record.getMessage() for record in caplog.records if record.name == choose_quant.__module__]
    assert len(said) == 4 and said[0] == said[2]
    assert said[0] == "Serving in int4, since llama is stored in four bits; --quant none is 16 bits or more"
    assert "no kernels for this processor" in said[1] and "7.5, and 8.0 is needed" in said[3]


def test_on_a_card_the_least_value_is_that_of_the_middle():
    """torch's kernel has its zero at level 8, and keeps 8 bits of a number's digits."""
    torch.manual_seed(0)
    levels, scale = torch.randint(0, 16, (64, 4, 32)), torch.rand(64, 4) + 0.5
    groups = Groups(levels.flatten(1).to(torch.uint8), scale, -7 * scale)
    taken, scales = take_over(groups, ON_CARD)
    assert torch.equal(taken, groups.levels)
    found = (levels - 8) * scales[..., :1].float() + scales[..., 1:].float()
    assert ((found - (levels - 7) * scale[..., None]).abs() <= scale[..., None] * 8 / 2**8).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_scales_that_no_number_of_16_bits_stands_for_are_refused(value):
    groups = Groups(torch.zeros(64, 32, dtype=torch.uint8), torch.full((64, 1), value), torch.zeros(64, 1))
    with pytest.raises(UserError, match="Use --quant none"):
        Int4Weight(groups, CPU)


@torch.inference_mode()
def test_the_default_model_is_as_good_as_its_own_weights():
    """Its file is of Q4_1: the text surprises it as much in four bits as dequantized."""
    source = open_model(DEFAULT_MODEL)
    assert choose_quant(None, CPU, source=source) == "int4"
    model: Any = source.whole_model(torch.float32)
    ids = torch.tensor([source.tokenizer()(PROSE.read_text("utf-8"))["input_ids"]])
    wanted = model(ids, use_cache=False).logits[0]
    span = Span.load(source, 0, source.num_blocks, quant="int4")
    assert span.weight_bytes == sum(needs_of(source.config, span.dtype, "int4", source.in_few_bits).block_bytes)
    hidden = span.forward(model.get_input_embeddings()(ids), 0, source.num_blocks)
    found = model.lm_head(model.model.norm(hidden))[0]
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    ours, theirs = (
        math.exp(nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()) for logits in (found, wanted)
    )
    assert abs(ours / theirs - 1) < 1e-3


def test_memory_is_as_planned_and_little_more_while_loading(home, tmp_path):
    path = tmp_path / "large.gguf"
    write_large(path)
    taken = taken_by_loading(path, quant="int4")
    assert taken.planned == taken.weights > 150e6
    assert 0.95 <= taken.kept / taken.planned <= 1.05, taken
    assert taken.most <= 1.25 * taken.planned, taken


def test_weights_are_read_in_pieces_and_each_row_once(file_of, monkeypatch):
    """Also where queries lie in pairs, and for what is made of several tensors."""
    monkeypatch.setattr(int4, "_PIECE", 2**15)
    read: dict[str, list[np.ndarray]] = {}
    read_levels = GgufCheckpoint.read_levels

    def reading(self: GgufCheckpoint, name: str, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        found = read_levels(self, name, rows)
        assert found[0].size <= 2**15
        read.setdefault(name, []).append(rows)
        return found

    monkeypatch.setattr(GgufCheckpoint, "read_levels", reading)
    source = file_of("mixtral", Q4_0)
    Span.load(source, 1, 2, quant="int4")
    assert len(read) == 7 and all(len(pieces) > 1 for name, pieces in read.items() if "_exps" in name)
    for name, pieces in read.items():
        rows, _ = source.checkpoint.rows_and_columns(name)
        assert sorted(np.concatenate(pieces)) == list(range(rows)), name


def test_a_file_that_became_shorter_is_told_of(file_of):
    source = file_of("llama", Q4_0)
    assert source.in_few_bits
    path = source.checkpoint._parts[0]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="ends too early: it has been changed. Download it again"):
        Span.load(source, 0, source.num_blocks, quant="int4")
