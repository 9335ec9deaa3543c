"""The head and the embeddings: one tensor or two, as the weights say where config.json says otherwise."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals_win.client import hollow
from petals_win.client.hollow import hollow_model
from petals_win.errors import UserError
from petals_win.models.checkpoint import SINGLE
from petals_win.models.source import open_model

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
FAMILIES = {  # what their checkpoints call the head and the embeddings
    "llama": (HEAD, EMBEDDINGS),
    "gpt2": (HEAD, "transformer.wte.weight"),
    "gemma3": ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
}


@pytest.fixture(autouse=True)
def plain_linears(monkeypatch):
    monkeypatch.setattr(hollow, "fast_head", lambda head, *_: head)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A copy of a checkpoint whose tensors `edit` has changed, and what its config.json says of them."""

    def change(family: str, tied: bool, edit) -> Path:
        folder = Path(shutil.copytree(checkpoint(family), tmp_path / family))
        tensors = load((folder / SINGLE).read_bytes())
        edit(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def both_ways(folder: Path) -> list[PreTrainedModel]:
    """The models that are to give the same: the whole one and the client's, its layers taken out."""
    source = open_model(str(folder))
    return [source.whole_model(), hollow_model(source, torch.nn.Identity())]


@torch.no_grad()
def logits_of_the_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.get_output_embeddings()(hidden)


def parameters(model: PreTrainedModel) -> set[int]:
    return {layer.weight.data_ptr() for layer in (model.get_input_embeddings(), model.get_output_embeddings())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_kept(changed, family, caplog):
    torch.manual_seed(0)
    head = torch.randn(320, 64)
    folder = changed(family, True, lambda tensors: tensors.update({FAMILIES[family][0]: head}))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, hidden = torch.tensor([[5, 9, 200, 7]]), torch.randn(1, 4, 64)
    assert (theirs.get_input_embeddings().weight - theirs.get_output_embeddings().weight).abs().max() > 1
    with caplog.at_level(logging.WARNING, logger="petals_win"):
        whole, client = both_ways(folder)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("petals_win")]
    assert len(warnings) == 2 and all(HEAD in said and "differ" in said for said in warnings)
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, theirs(ids).logits)
    assert torch.equal(client.get_output_embeddings().weight, head)
    assert torch.equal(logits_of_the_head(client, hidden), logits_of_the_head(theirs, hidden))
    for model in (whole, client):
        model.tie_weights()  # as whoever goes on with the model may
        assert len(parameters(model)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_equal_head_is_one_with_the_embeddings(changed, family, caplog):
    def copy(tensors):
        head, embeddings = FAMILIES[family]
        tensors[head] = tensors[embeddings].clone()

    folder = changed(family, True, copy)
    with caplog.at_level(logging.WARNING, logger="petals_win"):
        models = both_ways(folder)
    assert not [record for record in caplog.records if record.name.startswith("petals_win")]
    assert [len(parameters(model)) for model in models] == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head_the_embeddings_are_it(changed, family, caplog):
    folder = changed(family, False, lambda tensors: tensors.pop(FAMILIES[family][0], None))
    with caplog.at_level(logging.WARNING, logger="petals_win"):
        models = both_ways(folder)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("petals_win")]
    assert len(warnings) == 2 and all(f"lacks {HEAD}" in said for said in warnings)
    for model in models:
        assert len(parameters(model)) == 1
        model.tie_weights()
        assert len(parameters(model)) == 1


def test_without_embeddings_the_head_is_them(changed):
    def swap(tensors):
        tensors[HEAD] = tensors.pop(EMBEDDINGS)

    folder = changed("llama", True, swap)
    head = load((folder / SINGLE).read_bytes())[HEAD]
    for model in both_ways(folder):
        assert len(parameters(model)) == 1 and torch.equal(model.get_input_embeddings().weight, head)


@pytest.mark.parametrize("tied", [True, False])
def test_with_neither_it_is_refused(changed, tied):
    def drop(tensors):
        tensors.pop(HEAD, None)
        tensors.pop(EMBEDDINGS)

    source = open_model(str(changed("llama", tied, drop)))
    with pytest.raises(UserError, match="lacks the tensor lm_head.weight and 1 more"):
        source.whole_model()
    with pytest.raises(UserError, match="lacks the tensor lm_head.weight and 1 more"):
        hollow_model(source, torch.nn.Identity())
