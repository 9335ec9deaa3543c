"""Weights that somebody quantized in a format that is not read: refused by name before anything large is fetched or read."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save_file
from typer.testing import CliRunner

from models.hub import running_hub
from petals_win.cli.main import app
from petals_win.client.hollow import hollow_model
from petals_win.doctor.findings import Asked
from petals_win.doctor.model import check_model
from petals_win.errors import UserError
from petals_win.models.checkpoint import INDEX, SINGLE, SafetensorsCheckpoint
from petals_win.models.source import open_model
from petals_win.span.span import Span

# What quantization_config says in models of the hub, and the word of it that the user is to read.
METHODS = {
    "compressed-tensors (pack-quantized)": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "gptq": {"quant_method": "gptq", "bits": 3, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemv", "zero_point": True},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "aqlm": {"quant_method": "aqlm"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "hqq": {"quant_method": "hqq"},
    "exl2": {"quant_method": "exl2", "bits": 4.0},
    "does not name": {"group_size": 64, "bits": 4},
}


@pytest.fixture
def copy_of(checkpoint, tmp_path):
    """A checkpoint that the test may change."""

    def copy(family: str, **settings) -> Path:
        return Path(shutil.copytree(checkpoint(family, **settings), tmp_path / family))

    return copy


def describe(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def add(folder: Path, tensors: dict[str, torch.Tensor], gone: tuple[str, ...] = ()) -> None:
    """Rewrite the single file of a checkpoint with other tensors beside, or in the place of, some that it has."""
    held = {**load((folder / SINGLE).read_bytes()), **tensors}
    save_file({name: tensor for name, tensor in held.items() if name not in gone}, folder / SINGLE)


def refused(act) -> str:
    with pytest.raises(UserError) as error:
        act()
    return str(error.value)


def check_sentence(said: str, method: str, name: str) -> None:
    assert name in said and method in said, said
    assert "petals-win does not read" in said and "16-bit safetensors" in said and "GGUF" in said and "int4" in said


@pytest.mark.parametrize("method", METHODS)
def test_refused_by_the_configuration(method, copy_of):
    folder = copy_of("llama")
    describe(folder, quantization_config=METHODS[method])
    check_sentence(refused(lambda: open_model(str(folder))), method, "llama")


def test_where_else_it_may_be_said(copy_of):
    folder = copy_of("gemma3")
    config = json.loads((folder / "config.json").read_text())
    describe(folder, text_config={**config["text_config"], "quantization_config": METHODS["modelopt"]})
    check_sentence(refused(lambda: open_model(str(folder))), "modelopt", "gemma3")
    describe(
        folder, text_config=config["text_config"], compression_config=METHODS["compressed-tensors (pack-quantized)"]
    )
    check_sentence(refused(lambda: open_model(str(folder))), "compressed-tensors", "gemma3")
    describe(folder, compression_config=None, quantization={"group_size": 64, "bits": 4})
    assert "does not name" in refused(lambda: open_model(str(folder)))


@pytest.mark.parametrize(
    "nothing", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}]
)
def test_a_configuration_that_quantizes_nothing(nothing, copy_of):
    folder = copy_of("llama")
    describe(folder, quantization_config=nothing)
    Span.load(open_model(str(folder)), 0, 1)


@pytest.mark.parametrize("method", ["gptq", "modelopt"])
def test_every_command_says_the_same_and_fetches_nothing_large(method, copy_of, tmp_path, monkeypatch):
    folder = copy_of("llama", shard_size=30_000)
    describe(folder, quantization_config=METHODS[method])
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        hub.models["someone/small"] = {file.name: file.read_bytes() for file in folder.iterdir()}
        said = refused(lambda: open_model("someone/small"))
        check_sentence(said, method, "small")
        planned = CliRunner().invoke(app, ["plan", "--model", "someone/small", "--gpu", "12GiB"])
        assert isinstance(planned.exception, UserError) and str(planned.exception) == said
        findings = list(check_model(Asked(model="someone/small")))
        assert [finding.level for finding in findings] == ["error"]
        assert said in f"{findings[0].text} {findings[0].fix}"
        asked = {path.rpartition("/")[2] for _, path, _ in hub.requests}
    assert "config.json" in asked and not any(name.endswith(".safetensors") for name in asked), asked


WEIGHT = "model.layers.1.mlp.up_proj.weight"
# By the format whose name config.json lost: tensors beside the weight, or in its place, as published models have them.
COMPANIONS = {
    "fp8 by blocks": {WEIGHT + "_scale_inv": torch.ones(1, 1)},
    "fp8 by tensor": {WEIGHT + "_scale": torch.ones(1)},
    "static activations": {WEIGHT.replace("weight", "input_scale"): torch.ones(1)},
    "bitsandbytes int8": {WEIGHT.replace("weight", "SCB"): torch.ones(128)},
    "bitsandbytes nf4": {WEIGHT + ".absmax": torch.ones(128), WEIGHT + ".quant_map": torch.ones(16)},
    "gptq": {WEIGHT.replace("weight", word): torch.ones(8, 8) for word in ("qweight", "qzeros", "scales", "g_idx")},
    "packed": {WEIGHT.replace("weight", "weight_packed"): torch.ones(8, 8, dtype=torch.int32)},
    "nvfp4": {WEIGHT + "_scale_2": torch.ones(1)},
    "lora not merged": {WEIGHT.replace("weight", "lora_A.weight"): torch.ones(4, 64)},
}


@pytest.mark.parametrize("form", COMPANIONS)
def test_tensors_that_belong_to_a_weight_are_never_dropped(form, copy_of, monkeypatch):
    folder = copy_of("llama")
    replaced = form in ("gptq", "packed")
    add(folder, COMPANIONS[form], gone=(WEIGHT,) if replaced else ())
    source = open_model(str(folder))
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda *_: pytest.fail("a weight was read"))
    for act in (
        lambda: Span.load(source, 1, 2),
        lambda: Span.load(source, 2, 3),  # nor is any other part of such a model served
        lambda: hollow_model(source, torch.nn.Identity()),
        source.whole_model,
    ):
        said = refused(act)
        assert any(key in said for key in COMPANIONS[form]), said
        if "lora" not in form:
            check_sentence(said, "does not name", "llama")


@pytest.mark.parametrize(
    "family, key",
    [
        ("mixtral", "model.layers.2.block_sparse_moe.experts.1.w1.weight_scale_inv"),
        ("deepseek_v3", "model.layers.2.mlp.experts.1.up_proj.weight_scale_inv"),
        ("deepseek_v3", "model.layers.2.mlp.experts.1.up_proj.qweight"),
        ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj_blocks"),
        ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj_scales"),
        ("gpt2", "transformer.h.2.mlp.c_fc.weight_scale"),
        ("gemma3", "model.language_model.layers.2.mlp.up_proj.weight_scale"),
    ],
)
def test_in_other_architectures(family, key, copy_of):
    folder = copy_of(family)
    add(folder, {key: torch.ones(1)})
    assert key in refused(lambda: Span.load(open_model(str(folder)), 0, 1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_floats_without_scales(dtype, copy_of, monkeypatch):
    folder = copy_of("llama")
    add(folder, {WEIGHT: torch.zeros(128, 64).to(dtype)})
    source = open_model(str(folder))
    Span.load(source, 0, 1)
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda *_: pytest.fail("a weight was read"))
    said = refused(lambda: Span.load(source, 1, 2))
    check_sentence(said, "F8_E", "llama")
    assert WEIGHT in said


def test_integers_without_scales(copy_of):
    folder = copy_of("llama")
    add(folder, {WEIGHT: torch.ones(128, 64, dtype=torch.int8)})
    said = refused(lambda: Span.load(open_model(str(folder)), 1, 2))
    check_sentence(said, "int8", "llama")
    assert WEIGHT in said


# What transformers leaves aside, too: in checkpoints that are served.
HARMLESS = {
    "llama": {
        "model.layers.1.mlp.up_proj.bias": torch.zeros(128),  # as quantizers put in, and leave behind
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.4.mlp.up_proj.weight": torch.ones(128, 64),  # of layers that guess ahead
        "model.layers.4.mlp.up_proj.weight_scale": torch.ones(1),
        "vision_tower.encoder.layers.0.fc1.weight": torch.ones(8, 8),
        "medusa_head.0.0.linear.weight": torch.ones(8, 8),
        "mtp.layers.0.weight": torch.ones(8, 8),
        "v_head.summary.weight": torch.ones(1, 64),
    },
    "gpt2": {
        "transformer.h.1.attn.bias": torch.ones(1, 1, 256, 256),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": torch.ones(0),  # filled in below: a copy of the embeddings
    },
    "gpt_neox": {
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 256, 256),
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(2),
    },
    "gemma3": {"model.vision_tower.more.weight": torch.ones(8, 8)},
    "mpt": {"transformer.wpe.weight": torch.ones(256, 64)},
}


@pytest.mark.parametrize("family", HARMLESS)
def test_harmless_extra_tensors(family, copy_of, checkpoint):
    folder, extra = copy_of(family), dict(HARMLESS[family])
    if family == "gpt2":
        extra["lm_head.weight"] = load((folder / SINGLE).read_bytes())["transformer.wte.weight"].clone()
    add(folder, extra)
    plain, source = (open_model(str(place)) for place in (checkpoint(family), folder))
    hidden = torch.randn(1, 3, 64)
    outputs = [Span.load(one, 0, 3).forward(hidden, 0, 3) for one in (plain, source)]
    assert torch.equal(*outputs)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(plain.whole_model()(ids).logits, source.whole_model()(ids).logits)
    hollow_model(source, torch.nn.Identity())


def test_a_checkpoint_in_shards_is_refused_from_its_index(copy_of):
    folder = copy_of("llama", shard_size=30_000)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][WEIGHT + "_scale_inv"] = index["weight_map"][WEIGHT]
    (folder / INDEX).write_text(json.dumps(index))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert "weight_scale_inv" in refused(lambda: Span.load(open_model(str(folder)), 0, 1))


def test_a_bias_that_the_model_has_no_place_for(copy_of):
    folder = copy_of("llama")
    add(folder, {WEIGHT.replace("weight", "bias"): 0.1 * torch.ones(128)})
    assert "up_proj.bias, but the model" in refused(lambda: Span.load(open_model(str(folder)), 1, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(value, dtype, tmp_path, checkpoint):
    for key, act in (
        (WEIGHT, lambda source: Span.load(source, 1, 2)),
        ("model.norm.weight", lambda source: hollow_model(source, torch.nn.Identity())),
    ):
        folder = Path(shutil.copytree(checkpoint("llama", dtype=dtype), tmp_path / key / "llama"))
        held = load((folder / SINGLE).read_bytes())
        held[key].view(-1)[-1] = value
        save_file(held, folder / SINGLE)
        source = open_model(str(folder))
        Span.load(source, 0, 1)
        said = refused(functools.partial(act, source))
        assert f"The tensor {key} of llama" in said and "NaN" in said


def test_a_sum_that_overflows_is_no_fault(copy_of):
    folder = copy_of("llama", dtype=torch.float16)
    add(folder, {WEIGHT: torch.full((128, 64), 60_000.0, dtype=torch.float16)})
    Span.load(open_model(str(folder)), 1, 2)
