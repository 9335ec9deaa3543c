"""Models that cannot be served in spans are refused by name, with a reason, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from petals_win.errors import UserError
from petals_win.models.source import open_model
from petals_win.span.footprint import model_footprint

REFUSED = {
    "recurrent_gemma": "recurrent state",
    "mamba": "drops what its blocks have seen",
    "falcon_mamba": "drops what its blocks have seen",
    "jamba": "drops what its blocks have seen",
    "minimax": "recurrent state",
    "rwkv": "recurrent state",
    "zamba": "embeddings beside",
    "zamba2": "embeddings beside",
    "deepseek_v4": "more than keys and values",
    "dory": "several times",
    "inkling2_loop_text": "several times",
    "mllama": "images",
    "hy_v4": "more than the previous block's output",
    "qwen4_exp_text": "more than the previous block's output",
    "glm5_next": "more than petals-win keeps",
    "gemma4_unified_assistant": "guesses ahead for another model",
    "blt": "cannot split",
    "t5": "an encoder",
    "whisper": "an encoder",
}


def folder_with(config: dict, tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name_with_a_reason(model_type, tmp_path):
    with pytest.raises(UserError) as refused:
        open_model(folder_with({"model_type": model_type}, tmp_path))
    assert f"type {model_type} " in str(refused.value)
    assert REFUSED[model_type] in str(refused.value)
    assert "Llama" in str(refused.value), "what to choose instead"


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "bert", "openai-gpt", "vit"])
def test_refused_when_the_blocks_are_looked_at(model_type, tmp_path):
    source = open_model(folder_with({"model_type": model_type}, tmp_path))
    with pytest.raises(UserError, match=f"type {model_type} .*Choose a model of another type"):
        model_footprint(source.config, torch.float32)


def test_a_model_with_its_own_code_is_not_run(tmp_path):
    config = {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}
    (tmp_path / "configuration_chatglm.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(UserError, match="chatglm bring their own Python code"):
        open_model(folder_with(config, tmp_path))


def test_an_unknown_type(tmp_path):
    with pytest.raises(UserError, match="type from_tomorrow are unknown here.*transformers"):
        open_model(folder_with({"model_type": "from_tomorrow"}, tmp_path))


def test_the_types_that_are_refused_exist():
    for model_type in REFUSED:
        assert AutoConfig.for_model(model_type).model_type == model_type
