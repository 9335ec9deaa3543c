"""Models that cannot be served in spans are refused by name, with a reason, before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct
from base64 import b64encode
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


def sentencepiece_model() -> bytes:
    """The smallest that a model of the Llama family could have: ten pieces."""

    def field(number: int, kind: int, payload: bytes) -> bytes:
        return bytes([number << 3 | kind]) + (bytes([len(payload)]) if kind == 2 else b"") + payload

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((letter, 1) for letter in "\u2581abcdef")]
    bodies = [
        field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", 0)) + field(3, 0, bytes([kind]))
        for text, kind in pieces
    ]
    return b"".join(field(1, 2, body) for body in bodies)


def test_a_tokenizer_in_another_format(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match="tokenizer of llama has no words.*Download the model again"):
        open_model(str(folder)).tokenizer()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(UserError, match="as tokenizer.model only.*python -m pip install sentencepiece tiktoken"):
        open_model(str(folder)).tokenizer()
    (folder / "tokenizer.model").write_text(
        "".join(f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    )
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="or as ranks of tiktoken.*python -m pip install sentencepiece tiktoken"):
        open_model(str(folder)).tokenizer()
