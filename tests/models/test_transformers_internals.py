"""What petals-win uses of transformers beyond its public names. When a new transformers breaks it, this fails first.

Each test names the function of transformers that it is about.
"""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from span.families import random_model
from transformers import conversion_mapping, core_model_loading, modeling_gguf_pytorch_utils, modeling_utils
from transformers.integrations.gguf import gguf_tokenizer_mapping

from petals_win.models.architecture import empty_model, find_blocks
from petals_win.models.source import open_model
from petals_win.models.transformers_internals import GgufNames, Loader, inverse_frequencies, pre_tokenizer_split


def test_the_version_is_one_that_was_tested():
    """Another one may work as well: widen the range in pyproject.toml and here when all of this room's tests pass."""
    assert Version("5.24") <= Version(transformers.__version__) < Version("5.25")


@pytest.mark.parametrize(
    "function, parameters",
    [
        (conversion_mapping.get_model_conversion_mapping, ["model"]),
        (core_model_loading.rename_source_key, ["source_key", "weight_renamings", "weight_converters"]),
        (core_model_loading.convert_and_load_state_dict_in_model, ["model", "state_dict", "load_config"]),
        (modeling_gguf_pytorch_utils.get_gguf_hf_weights_map, ["hf_model", "processor", "model_type"]),
        (gguf_tokenizer_mapping.convert_gguf_tokenizer, ["architecture", "tokenizer_dict"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_parameters_begin_as_they_did(function, parameters):
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_load_state_dict_config_has_the_fields():
    fields = modeling_utils.LoadStateDictConfig.__dataclass_fields__
    assert {"device_map", "dtype", "dtype_plan", "weight_mapping"} <= set(fields)


def test_reading_ahead_can_be_turned_off():
    """The variable is looked at where tensors are read; renamed, it would do nothing without a word."""
    assert "HF_DEACTIVATE_ASYNC_LOAD" in inspect.getsource(core_model_loading)


class Recorded:
    """A tensor that tells when it is read."""

    def __init__(self, tensor: torch.Tensor, reads: list[str], name: str):
        self._tensor, self._reads, self._name = tensor, reads, name

    def __getitem__(self, index):
        assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == "1"
        self._reads.append(self._name)
        return self._tensor[index]


def test_the_loader_reads_what_it_is_given_and_nothing_else():
    whole = random_model("llama")
    model = empty_model(whole.config, torch.bfloat16)
    loader, reads = Loader(model, torch.bfloat16), []
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = whole.state_dict()[name]
    assert loader.target(name) == name
    assert loader.load({name: Recorded(tensor, reads, name)}, torch.device("cpu")) == {name}
    assert reads == [name]
    loaded = model.get_parameter(name)
    assert loaded.dtype is torch.bfloat16 and torch.equal(loaded, tensor.bfloat16())
    assert model.get_parameter("model.layers.2.mlp.up_proj.weight").is_meta
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_experts_are_joined_on_the_way(checkpoint):
    source = open_model(str(checkpoint("mixtral")))
    model = empty_model(source.config, torch.float32)
    prefix, loader = f"{find_blocks(model).prefix}1.", Loader(model, torch.float32)
    tensors = {key: t for key, t in source.checkpoint.tensors(model).items() if loader.target(key).startswith(prefix)}
    filled = loader.load(tensors, torch.device("cpu"))
    assert len(tensors) > len(filled), "several tensors of the checkpoint became one"
    assert filled == {name for name in loader.expected_names if name.startswith(prefix)}


def test_a_wrong_shape_is_named():
    model = empty_model(random_model("llama").config, torch.float32)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has the shape \[3, 64\] .* needs \[128, 64\]"):
        Loader(model, torch.float32).load(
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 64)}, torch.device("cpu")
        )


def test_names_of_gguf_tensors():
    model = empty_model(random_model("llama").config, torch.float32)
    names = GgufNames(model, "llama")
    assert names.target("blk.3.ffn_up.weight") == "model.layers.3.mlp.up_proj.weight"
    assert names.target("token_embd.weight") == "model.embed_tokens.weight"
    assert names.target("rope_freqs.weight") is None
    up = np.arange(128 * 64, dtype=np.float32).reshape(128, 64)
    target = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(names.convert({"blk.3.ffn_up.weight": up}, target), torch.from_numpy(up))


def test_frequencies_of_a_rotary_embedding():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    config = random_model("llama", rope_parameters=rope).config
    assert inverse_frequencies(config) == pytest.approx(1e4 ** (-np.arange(0, 16, 2) / 16) / 4, rel=1e-6)


def test_rules_by_which_words_are_told_apart():
    assert all(pre_tokenizer_split(rule) for rule in ("llama-bpe", "qwen2", "tekken", "gpt-4o"))
    assert pre_tokenizer_split("no such rule") is None


def test_gguf_queries_are_permuted_back():
    """llama.cpp stores the rows of query and key in another order, which transformers undoes."""
    model = empty_model(random_model("llama").config, torch.float32)
    names = GgufNames(model, "llama")
    rows = torch.arange(64, dtype=torch.float32)[:, None].expand(64, 64)
    stored = rows.reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).contiguous().numpy()  # 4 heads of 16
    target = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(names.convert({"blk.0.attn_q.weight": stored}, target), rows)
