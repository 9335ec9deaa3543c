"""The shapes of well-known models, so that they can be planned for without a network or a token.

Knows public figures of their configurations. Does not know where their weights are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig


@dataclass(frozen=True)
class KnownModel:
    """A family of models of one shape: the id of one of them, and the pattern of all of their ids on the Hugging Face hub."""

    name: str
    ids: str
    kind: type[PreTrainedConfig]
    shape: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        shape = {**self.shape, "tie_word_embeddings": False, "dtype": torch.float16}
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


KNOWN_MODELS = (
    KnownModel("meta-llama/Llama-2-7b-hf", r"meta-llama/Llama-2-7b(-chat)?-hf", LlamaConfig, _llama(32, 4096, 11008, 32, 32, 32000)),
    KnownModel("meta-llama/Llama-2-13b-hf", r"meta-llama/Llama-2-13b(-chat)?-hf", LlamaConfig, _llama(40, 5120, 13824, 40, 40, 32000)),
    KnownModel("meta-llama/Llama-2-70b-hf", r"meta-llama/Llama-2-70b(-chat)?-hf", LlamaConfig, _llama(80, 8192, 28672, 64, 8, 32000)),
    KnownModel("meta-llama/Meta-Llama-3-8B", r"meta-llama/(Meta-)?Llama-3(\.1)?-8B(-Instruct)?", LlamaConfig, _llama(32, 4096, 14336, 32, 8, 128256)),
    KnownModel("meta-llama/Meta-Llama-3-70B", r"meta-llama/(Meta-)?Llama-3(\.[13])?-70B(-Instruct)?", LlamaConfig, _llama(80, 8192, 28672, 64, 8, 128256)),
    KnownModel("mistralai/Mistral-7B-v0.1", r"mistralai/Mistral-7B(-Instruct)?-v0\.[12]", MistralConfig, _llama(32, 4096, 14336, 32, 8, 32000)),
)  # fmt: skip


def find_known_model(name: str) -> KnownModel | None:
    """The known model that has `name` as its id on the hub."""
    return next((model for model in KNOWN_MODELS if re.fullmatch(model.ids, name, re.IGNORECASE)), None)
