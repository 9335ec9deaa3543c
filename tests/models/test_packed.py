"""Weights that were published quantized: each format gives the numbers that its definition says, and computes with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from petals_win.errors import UserError
from petals_win.models.checkpoint import SINGLE, SafetensorsCheckpoint
from petals_win.models.source import open_model
from petals_win.span.int4 import Int4Weight
from petals_win.span.needs import needs_of
from petals_win.span.span import Span

Parts = dict[str, torch.Tensor]
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float"}


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": weights}},
        **more,
    }


def packed_words(numbers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned numbers [rows, n] in words [rows, n * bits / 32]: number i is at the place order[i] of its word."""
    count = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // count, dtype=torch.int64)
    for index in range(count):
        words |= numbers[:, index::count].long() << (bits * (index if order is None else order[index]))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A value for each block, for each number of a matrix."""
    return torch.tensor([[float(scale[row * scale.shape[0] // rows, column * scale.shape[1] // columns])
                          for column in range(columns)] for row in range(rows)])  # fmt: skip


def fp8(
    scale_shape: tuple[int, ...], name: str = "weight_scale_inv"
) -> Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]:
    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        shape = tuple(-(-size // 48) for size in weight.shape) if scale_shape == (48, 48) else scale_shape
        shape = (len(weight), *shape[1:]) if shape[:1] == (0,) else shape
        scale = torch.rand(shape) / 8 + 0.01
        small = (weight * 4).to(torch.float8_e4m3fn)
        if scale_shape == (48, 48):
            rows, columns = (torch.arange(size) // 48 for size in weight.shape)
            plain = small.float() * scale[rows][:, columns]
        else:
            plain = small.float() * scale
        return {".weight": small, f".{name}": scale, ".input_scale": torch.ones(1)}, plain

    return make


def int8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    numbers, scale = torch.randint(-128, 128, weight.shape).to(torch.int8), torch.rand(len(weight), 1) / 500
    return {".weight": numbers, ".weight_scale": scale}, numbers * scale


def pack(zeros: bool) -> Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]:
    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = weight.shape
        numbers, scale = torch.randint(0, 16, weight.shape), torch.rand(rows, columns // 32) / 50
        parts = {".weight_packed": packed_words(numbers, 4), ".weight_scale": scale}
        parts[".weight_shape"] = torch.tensor([rows, columns])
        zero = torch.full(scale.shape, 8)
        if zeros:
            zero = torch.randint(0, 16, scale.shape)
            parts[".weight_zero_point"] = packed_words(zero.T.contiguous(), 4).T.contiguous()
        return parts, (numbers - spread(zero, rows, columns)) * spread(scale, rows, columns)

    return make


def gptq(act_order: bool, plus: int = 1, bits: int = 4) -> Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]:
    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = weight.shape
        groups = columns // 32
        numbers, scale = torch.randint(0, 2**bits, weight.shape), torch.rand(groups, rows) / 50
        zero = torch.randint(1, 2**bits, (groups, rows))
        group_of = torch.arange(columns) // 32
        if act_order:
            group_of = group_of[torch.randperm(columns)]
        parts = {".qweight": packed_words(numbers, bits).T.contiguous(), ".qzeros": packed_words(zero - plus, bits)}
        parts |= {".scales": scale, ".g_idx": group_of.int()}
        return parts, (numbers - zero[group_of].T) * scale[group_of].T

    return make


def awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    rows, columns = weight.shape
    numbers, zero = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // 32, rows))
    scale, order = torch.rand(columns // 32, rows) / 50, (0, 4, 1, 5, 2, 6, 3, 7)
    parts = {".qweight": packed_words(numbers, 4, order), ".qzeros": packed_words(zero, 4, order), ".scales": scale}
    return parts, ((numbers - zero.repeat_interleave(32, 0)) * scale.repeat_interleave(32, 0)).T


def bnb8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round().to(torch.int8)
    parts = {".weight": numbers, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, numbers * (largest[:, None] / 127)


def bnb4(kind: str, nested: bool) -> Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]:
    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        numbers, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        told = {f".weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        return {".weight": numbers, **told}, bnb.dequantize_4bit(numbers, state)

    return make


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(modelopt: bool) -> Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]:
    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = weight.shape
        numbers, scale = torch.randint(0, 16, weight.shape), (torch.rand(rows, columns // 16) + 1).to(
            torch.float8_e4m3fn
        )
        packed = (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8)
        plain = FP4[numbers] * spread(scale.float(), rows, columns) / 64
        if modelopt:
            parts = {".weight": packed, ".weight_scale": scale, ".weight_scale_2": torch.tensor(1 / 64)}
            return {**parts, ".input_scale": torch.ones(())}, plain
        parts = {".weight_packed": packed, ".weight_scale": scale, ".weight_global_scale": torch.tensor([64.0])}
        return {**parts, ".input_global_scale": torch.ones(1)}, plain

    return make


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]]] = {
    "fp8 by blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, fp8((48, 48))),
    "fp8 by tensor": ({"quant_method": "fp8"}, fp8(())),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8((0, 1), "weight_scale")),
    "float-quantized": (compressed("float-quantized", FLOAT8), fp8((0, 1), "weight_scale")),
    "float-quantized by tensor": (compressed("float-quantized", FLOAT8), fp8((1,), "weight_scale")),
    "int-quantized": (compressed("int-quantized", {"num_bits": 8, "type": "int"}), int8),
    "pack-quantized": (compressed("pack-quantized", INT4), pack(False)),
    "pack-quantized with zero points": (compressed("pack-quantized", {**INT4, "symmetric": False}), pack(True)),
    "gptq": ({**GPTQ, "desc_act": False}, gptq(False)),
    "gptq of eight bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, gptq(False, bits=8)),
    "gptq in the order of activations": ({**GPTQ, "desc_act": True}, gptq(True)),
    "gptq v2": ({**GPTQ, "desc_act": False, "checkpoint_format": "gptq_v2"}, gptq(False, 0)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
    "bitsandbytes nf4": (BNB4, bnb4("nf4", False)),
    "bitsandbytes nf4 twice": (BNB4, bnb4("nf4", True)),
    "bitsandbytes fp4": (BNB4, bnb4("fp4", False)),
    "nvfp4": (compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}), nvfp4(False)),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4(True)),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8((), "weight_scale")),
}


@pytest.fixture
def published(checkpoint, tmp_path):
    """Makes a folder with a model's quantized weights, and one with the plain weights that these stand for."""

    def make(kind: str) -> tuple[Path, Path]:
        config, quantize = KINDS[kind]
        folders = [Path(shutil.copytree(checkpoint("llama"), tmp_path / name)) for name in ("packed", "plain")]
        torch.manual_seed(5)
        packed, plain = ({}, {})
        for key, tensor in load((folders[0] / SINGLE).read_bytes()).items():
            packed[key] = plain[key] = tensor
            if key.endswith("_proj.weight"):
                del packed[key]
                parts, plain[key] = quantize(tensor)
                packed |= {key.removesuffix(".weight") + ending: part.contiguous() for ending, part in parts.items()}
        plain = {key: tensor.float().contiguous() for key, tensor in plain.items()}
        save_file(packed, folders[0] / SINGLE, {"format": "pt"})
        save_file(plain, folders[1] / SINGLE, {"format": "pt"})
        described = json.loads((folders[0] / "config.json").read_text())
        (folders[0] / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
        return folders[0], folders[1]

    return make


def change(folder: Path, changed: Callable[[Parts], object]) -> None:
    held = load((folder / SINGLE).read_bytes())
    changed(held)
    save_file(held, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_as_the_plain_weights(published, kind):
    packed, plain = published(kind)
    source = open_model(str(packed))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(plain)(input_ids=ids).logits
        found = source.whole_model()(input_ids=ids).logits
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    hidden = torch.randn(1, 5, 64)
    outputs = [Span.load(one, 1, 3).forward(hidden, 1, 3) for one in (source, open_model(str(plain)))]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * max(1, outputs[1].abs().max())


IN_ORDER = "gptq in the order of activations"
IN_FOUR_BITS = ("pack-quantized", "pack-quantized with zero points", "gptq", "gptq v2", "awq", IN_ORDER)


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_are_taken_over(published, kind):
    """All others are computed in 16 bits, unless somebody asks for int4, which then is another rounding."""
    packed, plain = published(kind)
    source = open_model(str(packed))
    assert bool(source.in_few_bits) == (kind in IN_FOUR_BITS)
    if kind not in IN_FOUR_BITS:
        return
    torch.manual_seed(0)
    hidden = torch.randn(1, 5, 64)
    span = Span.load(source, 1, 3, quant="int4")
    found, wanted = span.forward(hidden, 1, 3), Span.load(open_model(str(plain)), 1, 3).forward(hidden, 1, 3)
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    session = span.open(1, 5)
    steps = [span.step(session, hidden[:, index : index + 1]) for index in range(5)]
    assert (torch.cat(steps, dim=1) - wanted).norm() <= 1e-3 * wanted.norm()
    orders = [
        module.order for layer in span._decoder.layers for module in layer.modules() if isinstance(module, Int4Weight)
    ]
    assert orders and all((order is not None) == (kind == IN_ORDER) for order in orders)
    planned = sum(needs_of(source.config, span.dtype, "int4", source.in_few_bits).block_bytes[1:3])
    assert span.weight_bytes == planned + sum(order.nbytes for order in orders if order is not None)


def test_gradients_of_weights_in_an_order_of_their_own(published):
    packed, plain = published(IN_ORDER)
    spans = [
        Span.load(open_model(str(folder)), 1, 3, quant=quant) for folder, quant in ((packed, "int4"), (plain, "none"))
    ]
    torch.manual_seed(0)
    hidden, grad = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    found, wanted = (span.backward(hidden, grad, 1, 3)[0] for span in spans)
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_what_is_wrong_behind_the_rows_that_are_read_first_is_told(published):
    folder, _ = published("gptq")

    def change_the_last(held: dict[str, torch.Tensor]) -> None:
        assert held[WEIGHT + ".scales"].shape[1] > 64
        held[WEIGHT + ".qzeros"][:, -1] = -1

    change(folder, change_the_last)
    said = refused(lambda: Span.load(open_model(str(folder)), 1, 2, quant="int4"))
    assert f"{WEIGHT}.weight of packed cannot be made plain: its zero points can be understood in two ways" in said


def test_groups_of_different_sizes_stay_plain(published):
    """As no file has them, but the names of groups may say so."""
    folder, _ = published(IN_ORDER)
    group_of = torch.tensor([0] * 20 + [1] * 44, dtype=torch.int32)
    change(folder, lambda held: held.update({WEIGHT + ".g_idx": group_of}))
    source = open_model(str(folder))
    spans = [Span.load(source, 1, 2, quant=quant) for quant in ("int4", "none")]
    kept: Any = spans[0]._decoder.layers[0].get_submodule(WEIGHT.split(".", 3)[-1])
    assert type(kept) is torch.nn.Linear
    hidden = torch.randn(1, 5, 64)
    found, wanted = (span.forward(hidden, 1, 2) for span in spans)
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_inputs_in_another_order_than_the_configuration_says_are_refused(published):
    folder, _ = published("gptq")
    change(folder, lambda held: held.update({WEIGHT + ".g_idx": torch.arange(64, dtype=torch.int32) % 2}))
    said = refused(lambda: Span.load(open_model(str(folder)), 1, 2, quant="int4"))
    assert f"{WEIGHT}.weight of packed cannot be made plain: its inputs are in another order" in said


def test_gpt_oss_as_published(checkpoint, tmp_path):
    changes = {"hidden_size": 64, "intermediate_size": 64}
    folder = Path(shutil.copytree(checkpoint("gpt_oss", **changes), tmp_path / "gpt-oss"))
    held, plain = load((folder / SINGLE).read_bytes()), {}
    torch.manual_seed(5)
    for key in [key for key in held if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, rows = held.pop(key).shape
        blocks = torch.randint(0, 256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, rows, inner // 32), dtype=torch.uint8)
        held |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        plain[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(held, folder / SINGLE, {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": method}))
    model = open_model(str(folder)).whole_model(torch.float32)
    assert plain and all(torch.equal(model.get_parameter(key), weight) for key, weight in plain.items())


WEIGHT = "model.layers.1.mlp.up_proj"


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    return str(error.value)


@pytest.mark.parametrize(
    "kind, ending",
    [
        ("gptq", ".scales"),
        ("awq", ".qzeros"),
        ("pack-quantized", ".weight_shape"),
        ("bitsandbytes nf4", ".weight.absmax"),
        ("nvfp4", ".weight_global_scale"),
        ("modelopt nvfp4", ".weight_scale"),
    ],
)
def test_a_part_that_is_missing_is_named_before_a_weight_is_read(published, kind, ending, monkeypatch):
    folder, _ = published(kind)
    change(folder, lambda held: held.pop(WEIGHT + ending))
    source = open_model(str(folder))
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda *_: pytest.fail("a weight was read"))
    assert f"lacks the tensor {WEIGHT}{ending}, without which" in refused(lambda: Span.load(source, 2, 3))


@pytest.mark.parametrize(
    "kind, ending",
    [
        ("fp8 by blocks", ".weight_scale_inv"),
        ("float-quantized", ".weight_scale"),
        ("int-quantized", ".weight_scale"),
        ("bitsandbytes int8", ".SCB"),
        ("modelopt nvfp4", ".weight_scale_2"),
        ("modelopt fp8", ".weight_scale"),
    ],
)
def test_a_weight_that_lost_its_scale_is_refused(published, kind, ending):
    folder, _ = published(kind)
    change(folder, lambda held: held.pop(WEIGHT + ending))
    assert WEIGHT in refused(lambda: Span.load(open_model(str(folder)), 1, 2))


@pytest.mark.parametrize(
    "kind, ending, wrong",
    [
        ("fp8 by blocks", ".weight_scale_inv", torch.ones(2, 2)),
        ("float-quantized", ".weight_scale", torch.ones(5, 1)),
        ("int-quantized", ".weight_scale", torch.ones(128, 3)),
        ("pack-quantized", ".weight_shape", torch.tensor([64, 64])),
        ("pack-quantized", ".weight_packed", torch.ones(128, 8)),
        ("gptq", ".g_idx", torch.full((64,), 9, dtype=torch.int32)),
        ("gptq", ".qzeros", torch.full((2, 16), -1, dtype=torch.int32)),
        ("awq", ".scales", torch.ones(2, 64)),
        ("bitsandbytes int8", ".SCB", torch.ones(3)),
        ("nvfp4", ".weight_global_scale", torch.zeros(1)),
        ("nvfp4", ".weight_scale", torch.ones(128, 2).to(torch.float8_e4m3fn)),
        ("modelopt nvfp4", ".weight_scale", torch.ones(128, 4)),
        ("bitsandbytes nf4", ".weight.absmax", torch.ones(3)),
        ("bitsandbytes nf4", ".weight.quant_state.bitsandbytes__nf4", torch.ones(3, dtype=torch.uint8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(published, kind, ending, wrong):
    folder, _ = published(kind)
    change(folder, lambda held: held.update({WEIGHT + ending: wrong}))
    said = refused(lambda: Span.load(open_model(str(folder)), 1, 2))
    assert f"{WEIGHT}.weight of packed cannot be made plain" in said and "16-bit" in said


def test_a_further_scale_is_not_dropped(published):
    folder, _ = published("fp8 by blocks")
    change(folder, lambda held: held.update({WEIGHT + ".weight_scale_2": torch.ones(1)}))
    assert "weight_scale_2" in refused(lambda: Span.load(open_model(str(folder)), 1, 2))


def test_both_plain_and_quantized_is_refused(published):
    folder, _ = published("gptq")
    change(folder, lambda held: held.update({WEIGHT + ".weight": torch.ones(128, 64)}))
    assert "twice, plain and quantized" in refused(lambda: Span.load(open_model(str(folder)), 1, 2))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32}),
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        compressed("marlin-24", INT4),
        compressed("pack-quantized", INT4, transform_config={"config_groups": {"a": {}}}),
        compressed("pack-quantized", INT4, sparsity_config={"format": "sparse-24-bitmask"}),
        compressed("pack-quantized", {**INT4, "num_bits": 3}),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
)
def test_forms_that_are_not_read_are_refused(published, config):
    folder, _ = published("gptq")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    assert f"quantized by {config['quant_method']}" in refused(lambda: open_model(str(folder)))


def test_weights_that_lie_the_other_way_round_are_refused(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("gpt2"), tmp_path / "gpt2"))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**described, "quantization_config": KINDS["bitsandbytes int8"][0]})
    )
    change(folder, lambda held: held.update({"transformer.h.1.attn.c_proj.SCB": torch.ones(64)}))
    assert "the other way round" in refused(lambda: Span.load(open_model(str(folder)), 1, 2))
