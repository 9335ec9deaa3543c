"""The name that a model has by its content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from span.families import random_model

from petals_win.models.checkpoint import INDEX
from petals_win.models.content import content_id, gguf_file
from petals_win.models.source import DEFAULT_MODEL, open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("content") / "tiny"
    random_model("llama").save_pretrained(folder)
    return folder


def id_of(folder: Path) -> str:
    return open_model(str(folder)).content_id


def test_the_folder_and_who_wrote_the_configuration_do_not_matter(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "My Model v1.0")
    described = json.loads((copy / "config.json").read_text())
    described |= {"_name_or_path": "elsewhere", "transformers_version": "4.0.0"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(described.items()))))
    assert id_of(copy) == id_of(folder)
    name = open_model(str(copy)).swarm_name
    assert name == f"My-Model-v1-0-hf@{id_of(folder)}" and not set(name) & {".", " "}


def test_the_configuration_matters(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 0.5}))
    assert id_of(copy) != id_of(folder)


def test_values_matter_in_a_file_that_everybody_has(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "tiny")
    model = random_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(other)
    assert id_of(other) != id_of(folder)


def test_types_matter(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "tiny")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in random_model("llama").state_dict().items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert id_of(other) != id_of(folder)


def test_of_a_sharded_checkpoint_the_index_has_to_do(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    before = id_of(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(reversed(index["weight_map"].items()))}, indent=2))
    assert id_of(tmp_path) == before
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "b": "1.safetensors"}}))
    assert id_of(tmp_path) != before


def test_a_gguf_file(tmp_path):
    assert id_of(DEFAULT_MODEL).startswith("llama-")  # pyright: ignore[reportArgumentType]
    file = tmp_path / "model.gguf"

    def name(content: bytes) -> str:
        file.write_bytes(content)
        return content_id("llama", *gguf_file(file, 100))

    data = bytearray(200_000)
    first = name(bytes(data))
    assert first == name(bytes(data))
    for position in (0, 99, 100, 199_999):
        data[position] = 1
        assert name(bytes(data)) != first
        data[position] = 0
    assert name(bytes(data[:-1])) != first


@pytest.mark.parametrize("model_type", ["llama", "GPT NeoX.v2"])
def test_it_can_be_a_key(model_type):
    assert not set(content_id(model_type, b"")) & {".", " ", "@"}
