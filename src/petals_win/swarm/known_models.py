"""The shapes of well-known models, so that they can be planned for without a network or a token.

Knows public figures of their configurations. Does not know where their weights are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

STORED_IN = torch.float16  # as far as sizes go, the same as bfloat16


@dataclass(frozen=True)
class KnownModel:
    """A family of models of one shape: the id of one of them, and the pattern of all of their ids on the Hugging Face hub."""

    name: str
    ids: str
    kind: type[PreTrainedConfig]
    shape: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        shape = {**self.shape, "tie_word_embeddings": False, "dtype": STORED_IN}
        return self.kind(**shape)


def _llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        **_llama(layers, 2880, 2880, 64, 8, 201088),
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
    }


_GLM_AIR = {
    **_llama(46, 4096, 10944, 96, 8, 151552),
    "head_dim": 128,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "attention_bias": True,
}

KNOWN_MODELS = (
    KnownModel("meta-llama/Llama-2-7b-hf", r"meta-llama/Llama-2-7b(-chat)?-hf", LlamaConfig, _llama(32, 4096, 11008, 32, 32, 32000)),
    KnownModel("meta-llama/Llama-2-13b-hf", r"meta-llama/Llama-2-13b(-chat)?-hf", LlamaConfig, _llama(40, 5120, 13824, 40, 40, 32000)),
    KnownModel("meta-llama/Llama-2-70b-hf", r"meta-llama/Llama-2-70b(-chat)?-hf", LlamaConfig, _llama(80, 8192, 28672, 64, 8, 32000)),
    KnownModel("meta-llama/Meta-Llama-3-8B", r"meta-llama/(Meta-)?Llama-3(\.1)?-8B(-Instruct)?", LlamaConfig, _llama(32, 4096, 14336, 32, 8, 128256)),
    KnownModel("meta-llama/Meta-Llama-3-70B", r"meta-llama/(Meta-)?Llama-3(\.[13])?-70B(-Instruct)?", LlamaConfig, _llama(80, 8192, 28672, 64, 8, 128256)),
    KnownModel("mistralai/Mistral-7B-v0.1", r"mistralai/Mistral-7B(-Instruct)?-v0\.[12]", MistralConfig, _llama(32, 4096, 14336, 32, 8, 32000)),
    KnownModel("Qwen/Qwen3-32B", r"Qwen/Qwen3-32B", Qwen3Config, {**_llama(64, 5120, 25600, 64, 8, 151936), "head_dim": 128}),
    KnownModel("openai/gpt-oss-20b", r"openai/gpt-oss-20b", GptOssConfig, _gpt_oss(24, 32)),
    KnownModel("openai/gpt-oss-120b", r"openai/gpt-oss-120b", GptOssConfig, _gpt_oss(36, 128)),
    KnownModel("zai-org/GLM-4.5-Air", r"zai-org/GLM-4\.5-Air", Glm4MoeConfig, _GLM_AIR),
)  # fmt: skip


def find_known_model(name: str) -> KnownModel | None:
    """The known model that has `name` as its id on the hub."""
    return next((model for model in KNOWN_MODELS if re.fullmatch(model.ids, name, re.IGNORECASE)), None)
