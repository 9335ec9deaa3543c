"""Small dimensions for models of many architectures, in the words of each one's configuration."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

BLOCKS = 4
VOCABULARY = 320

COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED = dict(num_key_value_heads=2, intermediate_size=128)
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
_IMAGES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
_QWEN_IMAGES = dict(
    depth=2, hidden_size=32, embed_dim=32, num_heads=2, patch_size=4, intermediate_size=64, out_hidden_size=64
)
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_LLAMA4 = {
    **_GROUPED,
    "num_hidden_layers": 6,
    "intermediate_size": 32,
    "intermediate_size_mlp": 128,
    "head_dim": 16,
    "num_local_experts": 4,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 1, 0] * 2,
    "interleave_moe_layer_step": 2,
    "floor_scale": 16,
}

# Of eight blocks the last ones have no keys and values of their own: those that a block of each kind makes early are theirs.
_SHARING = {
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "sliding_window": 8,
    "layer_types": [
        *["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "sliding_attention",
        "full_attention",
    ],
    "num_kv_shared_layers": 3,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 10,
}
_GEMMA4 = {
    **_SHARING,
    "intermediate_size": 96,
    "global_head_dim": 20,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
}
_GEMMA3N = {
    **_SHARING,
    "intermediate_size": [96, 128] * 4,
    "activation_sparsity_pattern": [0.9, 0.0] * 4,
    "altup_num_inputs": 3,
    "laurel_rank": 6,
}
_GEMMA4_EXPERTS = {
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 12,
    "global_head_dim": 20,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}

_CHOOSING = {
    **LATENT,
    "num_hidden_layers": 6,
    "intermediate_size": 96,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "index_topk": 6,
    "index_head_dim": 20,
    "index_n_heads": 12,
}

# By a name of our own: the model type and what its configuration has besides the common dimensions.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 8}),
    "mixtral": ("mixtral", {**_GROUPED, **MOE, "sliding_window": None}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-half-windows": (
        "qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, **MOE, "head_dim": 16}),
    "qwen2_moe": ("qwen2_moe", {**_GROUPED, **MOE, "shared_expert_intermediate_size": 96}),
    "nemotron": ("nemotron", _GROUPED),
    "minimax_m2": ("minimax_m2", {**_GROUPED, **MOE, "intermediate_size": 32, "head_dim": 16}),
    "cohere": ("cohere", _GROUPED),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {**_GROUPED, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**COMMON, **_GROUPED, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
            "vision_config": _IMAGES,
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma3n_text": ("gemma3n_text", _GEMMA3N),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gemma4": (
        "gemma4",
        {
            "text_config": {**COMMON, **_GEMMA4},
            "vision_config": {**_IMAGES, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
            "audio_config": None,
        },
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        {
            **{name: value for name, value in _GEMMA4.items() if not name.endswith("_per_layer_input")},
            "num_kv_shared_layers": 4,
        },
    ),
    "gemma4-experts": ("gemma4_text", _GEMMA4_EXPERTS),
    "qwen2_vl": (
        "qwen2_vl",
        {
            "text_config": {**COMMON, **_GROUPED, "rope_parameters": _SECTIONS},
            "vision_config": {**_QWEN_IMAGES, "hidden_size": 64},
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {
                **COMMON,
                **_GROUPED,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            }
            | {"rope_parameters": _SECTIONS},
            "vision_config": _QWEN_IMAGES,
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {
                **COMMON,
                **_GROUPED,
                "head_dim": 16,
                "rope_parameters": {**_SECTIONS, "mrope_interleaved": True},
            },
            "vision_config": {**_QWEN_IMAGES, "deepstack_visual_indexes": [0, 1]},
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "text_config": {**COMMON, **_GROUPED, **MOE, "head_dim": 16}
            | {"rope_parameters": {**_SECTIONS, "mrope_interleaved": True}},
            "vision_config": {**_QWEN_IMAGES, "deepstack_visual_indexes": [0, 1]},
        },
    ),
    "llava": (
        "llava",
        {
            "text_config": {"model_type": "llama", **COMMON, **_GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **_IMAGES},
        },
    ),
    "llava_next": (
        "llava_next",
        {
            "text_config": {"model_type": "mistral", **COMMON, **_GROUPED, "sliding_window": 8},
            "vision_config": {"model_type": "clip_vision_model", **_IMAGES},
        },
    ),
    "llava_onevision": (
        "llava_onevision",
        {
            "text_config": {"model_type": "qwen2", **COMMON, **_GROUPED},
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGES},
        },
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **COMMON, **_GROUPED, "head_dim": 24, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **_IMAGES},
        },
    ),
    "internvl": (
        "internvl",
        {
            "text_config": {"model_type": "qwen3", **COMMON, **_GROUPED, "head_dim": 24},
            "vision_config": {
                "model_type": "internvl_vision",
                **_IMAGES,
                "image_size": [28, 28],
                "patch_size": [14, 14],
            },
        },
    ),
    "idefics3": (
        "idefics3",
        {"text_config": {"model_type": "llama", **COMMON, **_GROUPED}, "vision_config": _IMAGES},
    ),
    "smolvlm": (
        "smolvlm",
        {"text_config": {"model_type": "llama", **COMMON, **_GROUPED}, "vision_config": _IMAGES},
    ),
    "paligemma": (
        "paligemma",
        {
            "text_config": {"model_type": "gemma2", **COMMON, **_GROUPED, "head_dim": 16, "sliding_window": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGES, "projection_dim": 64},
            "projection_dim": 64,
        },
    ),
    "aya_vision": (
        "aya_vision",
        {
            "text_config": {"model_type": "cohere2", **COMMON, **_GROUPED, "sliding_window": 8, "head_dim": 16},
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGES},
        },
    ),
    "glm4v": (
        "glm4v",
        {
            "text_config": {
                **COMMON,
                **_GROUPED,
                "rope_parameters": {**_SECTIONS, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {**_QWEN_IMAGES, "image_size": 28},
        },
    ),
    "phi": ("phi", _GROUPED),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": 8}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 128}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_layers": BLOCKS,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], BLOCKS // 2]],
        },
    ),
    "biogpt": ("biogpt", {"intermediate_size": 128}),
    "jetmoe": (
        "jetmoe",
        {
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "llama4_text": ("llama4_text", _LLAMA4),
    "llama4": (
        "llama4",
        {"text_config": {**COMMON, **_LLAMA4}, "vision_config": {**_IMAGES, "vision_output_dim": 32}},
    ),
    "gptj": ("gptj", {"n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "codegen": ("codegen", {"n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2}),
    "falcon": ("falcon", {"alibi": False, "multi_query": True}),
    "falcon-new": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False}),
    "ctrl": ("ctrl", {"n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "dff": 128}),
    "olmo2": ("olmo2", _GROUPED),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", {**_GROUPED, "sliding_window": 8}),
    "cohere2": ("cohere2", {**_GROUPED, "sliding_window": 8, "head_dim": 16}),
    "granite": ("granite", {**_GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "ministral3": (
        "ministral3",
        {
            **_GROUPED,
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layer_interval": 2}),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 16}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, **MOE, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8}),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            **LATENT,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **LATENT,
        },
    ),
    "deepseek_v32": ("deepseek_v32", {**_CHOOSING, "n_group": 2, "topk_group": 1}),
    "axk2": ("axk2", {**_CHOOSING, "n_group": 2, "topk_group": 1}),
    # Blocks with a window have dimensions of their own, which would be large ones.
    "dots3_note_text": (
        "dots3_note_text",
        {
            **_CHOOSING,
            "shared_experts_intermediate_size": 32,
            "swa_num_attention_heads": 6,
            "swa_num_key_value_heads": 6,
            "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 12,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 20,
            "swa_v_head_dim": 24,
        },
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {**_CHOOSING, "indexer_types": ["full", "shared", "full", "full", "shared", "shared"]},
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            **LATENT,
            "num_hidden_layers": 2 * BLOCKS,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
    ),
}


def config_of(family: str, **changes) -> PreTrainedConfig:
    """The configuration of one of the families."""
    from span.hybrids import HYBRIDS

    model_type, dimensions = {**FAMILIES, **HYBRIDS}[family]
    # Where there is one of the text, the common dimensions stand in it.
    common = {} if "text_config" in dimensions else COMMON
    return AutoConfig.for_model(model_type, **{**common, **dimensions, **changes})


def random_model(family: str, **changes) -> PreTrainedModel:
    """A model of one of the families with random weights, always the same ones."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    auto_class = (
        AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    )
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # what a recurrence forgets: more of it would let states grow without bounds
                continue
            if parameter.ndim > 1:  # the default spread is so small that every token looks alike
                parameter.mul_(3)
            else:  # and norms that are all one, biases that are all zero, would hide their loss
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
