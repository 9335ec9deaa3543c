"""LoRA adapters on spans compute what peft computes on the whole model; those that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from petals_win.errors import UserError
from petals_win.models.architecture import find_blocks
from petals_win.models.source import open_model
from petals_win.span.span import Span

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter(checkpoint, folder: Path, seed: int = 0, **settings):
    """Saves a random adapter of the checkpoint's model; returns the tuned model."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    tuned = get_peft_model(
        open_model(str(checkpoint("llama"))).whole_model(), LoraConfig(init_lora_weights=False, **options)
    )
    tuned.save_pretrained(folder)
    return tuned.eval()


def load(checkpoint, *names: Path, start: int = 1, end: int = 3) -> Span:
    return Span.load(open_model(str(checkpoint("llama"))), start, end, adapters=[str(name) for name in names])


@torch.no_grad()
def blocks_of(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into block 1 and comes out of block 2."""
    layers, seen = find_blocks(model).layers, {}
    hooks = [
        layers[1].register_forward_pre_hook(lambda _m, args: seen.update(inputs=args[0])),
        layers[2].register_forward_hook(lambda _m, _a, output: seen.update(output=output)),
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen["inputs"], seen["output"]


def test_switched_for_each_request(checkpoint, tmp_path):
    ids = torch.tensor([[1, 5, 9, 200, 7, 31]])
    plain = blocks_of(open_model(str(checkpoint("llama"))).whole_model(), ids)
    one = blocks_of(adapter(checkpoint, tmp_path / "one").get_base_model(), ids)
    two = blocks_of(adapter(checkpoint, tmp_path / "two", seed=1, r=2).get_base_model(), ids)
    span = load(checkpoint, tmp_path / "one", tmp_path / "two")
    wanted = {"": plain, str(tmp_path / "one"): one, str(tmp_path / "two"): two}
    assert (one[1] - two[1]).abs().max() > 0.1 and (one[1] - plain[1]).abs().max() > 0.1

    sessions = {name: span.open(1, 6, adapter=name) for name in wanted}
    for name, (inputs, output) in wanted.items():
        assert (span.forward(inputs, 1, 3, adapter=name) - output).abs().max() <= 1e-4
    for token in range(6):  # in turn, so that each step has to switch
        for name, (inputs, output) in wanted.items():
            step = span.step(sessions[name], inputs[:, token : token + 1])
            assert (step - output[:, token : token + 1]).abs().max() <= 1e-4
    with pytest.raises(KeyError, match="no adapter 'three'"):
        span.open(1, 6, adapter="three")


def test_gradients_and_frozen_weights(checkpoint, tmp_path):
    adapter(checkpoint, tmp_path / "one")
    span = load(checkpoint, tmp_path / "one")
    torch.manual_seed(0)
    hidden, grad_out = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    grad, _ = span.backward(hidden, grad_out, 1, 3, adapter=str(tmp_path / "one"))
    step = 1e-2 * torch.randn(1, 4, 64)
    changed = [span.forward(hidden + sign * step, 1, 3, adapter=str(tmp_path / "one")) for sign in (1, -1)]
    slope = ((changed[0] - changed[1]) * grad_out).sum() / 2
    assert slope.item() == pytest.approx((grad * step).sum().item(), rel=0.05, abs=1e-3)
    assert not any(parameter.requires_grad for layer in span._decoder.layers for parameter in layer.parameters())


def refused(checkpoint, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load(checkpoint, folder)
    return str(error.value)


def test_what_cannot_be_served(checkpoint, tmp_path):
    adapter(checkpoint, tmp_path / "good")

    def changed(name: str, **config) -> Path:
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / name))
        described = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**described, **config}))
        return folder

    assert "has no adapter_config.json" in refused(checkpoint, checkpoint("llama"))
    (weightless := changed("weightless")).joinpath(WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refused(checkpoint, weightless)
    (damaged := changed("damaged")).joinpath(WEIGHTS).write_bytes(b"\0" * 50)
    assert "is damaged" in refused(checkpoint, damaged)
    (no_json := changed("no_json")).joinpath(CONFIG).write_text("{")
    assert "is damaged" in refused(checkpoint, no_json)
    assert "modules_to_save" in refused(checkpoint, changed("saved", modules_to_save=["lm_head"]))
    assert "bias" in refused(checkpoint, changed("biased", bias="all"))
    assert "is missing" in refused(
        checkpoint, changed("more", target_modules=["q_proj", "v_proj", "down_proj", "o_proj"])
    )

    outside = changed("outside")
    tensors = load_tensors((outside / WEIGHTS).read_bytes())  # unlike load_file it does not map the file
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, outside / WEIGHTS)
    assert "changes more than the model's blocks" in refused(checkpoint, outside)

    narrow = changed("narrow")
    save_file({name: tensor[..., :3].contiguous() for name, tensor in tensors.items()}, narrow / WEIGHTS)
    assert "does not fit this model" in refused(checkpoint, narrow)
    load(checkpoint, tmp_path / "good")


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 3], "layers_pattern": "layers"},
        {"target_modules": r"model\.layers\.3\..*(q|v)_proj"},
        {"exclude_modules": r"model\.layers\.[123]\..*"},
    ],
    ids=["layers", "layers by a pattern", "targets", "all others excluded"],
)
def test_an_adapter_of_other_blocks_adds_nothing_here(checkpoint, tmp_path, settings):
    """And is served, since a request goes through all blocks with its adapter or with none."""
    adapter(checkpoint, tmp_path / "elsewhere", **settings)
    adapter(checkpoint, tmp_path / "here", seed=1)
    span = load(checkpoint, tmp_path / "elsewhere", tmp_path / "here")
    hidden = torch.randn(1, 5, 64)
    plain, changed, with_it, again = (
        span.forward(hidden, 1, 3, adapter=str(name))
        for name in ("", tmp_path / "here", tmp_path / "elsewhere", tmp_path / "here")
    )
    assert torch.equal(with_it, plain) and torch.equal(again, changed)
    assert (changed - plain).abs().max() > 0.1
    session = span.open(1, 5, adapter=str(tmp_path / "elsewhere"))
    assert (span.step(session, hidden) - plain).abs().max() <= 1e-4
    alone = load(checkpoint, tmp_path / "elsewhere")
    assert torch.equal(alone.forward(hidden, 1, 3, adapter=str(tmp_path / "elsewhere")), plain)


def test_an_adapter_of_some_of_the_blocks(checkpoint, tmp_path):
    ids = torch.tensor([[1, 5, 9, 200, 7, 31]])
    tuned = adapter(checkpoint, tmp_path / "partly", layers_to_transform=[0, 2]).get_base_model()
    adapter(checkpoint, tmp_path / "all", seed=1)
    inputs, output = blocks_of(tuned, ids)
    span = load(checkpoint, tmp_path / "all", tmp_path / "partly")
    span.forward(inputs, 1, 3, adapter=str(tmp_path / "all"))
    assert (span.forward(inputs, 1, 3, adapter=str(tmp_path / "partly")) - output).abs().max() <= 1e-4
    assert (span.forward(inputs, 1, 3) - output).abs().max() > 0.1


def test_an_adapter_of_another_model_is_refused_by_every_node(checkpoint, tmp_path):
    adapter(checkpoint, tmp_path / "deeper", layers_to_transform=[3])
    file = tmp_path / "deeper" / WEIGHTS
    tensors = load_tensors(file.read_bytes())
    save_file({name.replace(".3.", ".30."): tensor for name, tensor in tensors.items()}, file)
    assert "changes the block 30 of 4" in refused(checkpoint, tmp_path / "deeper")
    save_file({}, file)
    assert "has no weights" in refused(checkpoint, tmp_path / "deeper")
    adapter(checkpoint, tmp_path / "other", target_modules=["q_proj"])
    file = tmp_path / "other" / WEIGHTS
    tensors = load_tensors(file.read_bytes())
    save_file({name.replace("q_proj", "c_attn"): tensor for name, tensor in tensors.items()}, file)
    assert "does not fit this model" in refused(checkpoint, tmp_path / "other")
    save_file({name: tensor for name, tensor in tensors.items() if ".0." in name}, file)
    assert "is missing" in refused(checkpoint, tmp_path / "other")
