"""The random models that gpu-check computes: small ones of six families, and larger ones for memory and speed.

Knows transformers' configurations. Does not know devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BLOCKS, VOCABULARY, CONTEXT = 4, 512, 2048
WINDOW = 8

_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 512, "head_dim": 32}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Grouped heads; none, and norms of heads; windows; experts; experts, sinks and windows; states that are no keys and values.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen3": {**_GROUPED, "num_key_value_heads": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 64, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "mixtral": {**_GROUPED, **_EXPERTS, "intermediate_size": 256},
    "gpt_oss": {**_GROUPED, **_EXPERTS, "intermediate_size": 64, "sliding_window": WINDOW},
    "qwen3_next": {
        **_GROUPED,
        **_EXPERTS,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    },
}
# A quarter of Llama 2 7B's width, for figures of memory.
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# Half of it, for speed.
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
# SmolLM2's shapes, for speed where its file is not there.
LIKE_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


def make_model(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with a random model in 32 bits, always the same one, and a tokenizer of as many words as it has tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 8,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**common, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default spread is so small that every token looks alike
                parameter.mul_(3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3")
    tokenizer.chat_template = "{% for message in messages %}w10 {{ message['content'] }} w11 w12{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
