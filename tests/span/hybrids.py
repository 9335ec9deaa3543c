"""Small models whose blocks carry recurrent states: two periods of their kinds of blocks and more, heads of odd sizes."""

from __future__ import annotations

from span.families import LATENT, MOE

_GROUPED = dict(num_key_value_heads=2, intermediate_size=96, head_dim=24)
_PERIOD = ["linear_attention", "linear_attention", "full_attention"]
_DELTA = dict(
    linear_key_head_dim=12,
    linear_value_head_dim=20,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    layer_types=_PERIOD * 2,
)
_MAMBA2 = dict(mamba_n_heads=6, mamba_d_head=20, mamba_expand=2, mamba_n_groups=2, mamba_d_state=12, mamba_d_conv=4)
_SSM = dict(hidden_size=60, mamba_chunk_size=8)

# By the model type, as in `families`; every block of the type named "hybrid" attends beside its recurrence.
HYBRIDS: dict[str, tuple[str, dict]] = {
    "qwen3_next": (
        "qwen3_next",
        {**_GROUPED, **MOE, **_DELTA, "num_hidden_layers": 6, "shared_expert_intermediate_size": 40},
    ),
    "lfm2": (
        "lfm2",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "conv_L_cache": 5,
            "layer_types": ["conv", "full_attention", "conv"] * 2,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **MOE,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_dense_layers": 2,
            "layer_types": ["conv", "full_attention", "conv"] * 2,
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", {**_GROUPED, **_DELTA, "num_hidden_layers": 6}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {**_GROUPED, **MOE, **_DELTA, "num_hidden_layers": 6, "shared_expert_intermediate_size": 40},
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        {**_GROUPED, **_DELTA, "linear_num_key_heads": 6, "num_hidden_layers": 6},
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **MOE,
            **LATENT,
            "intermediate_size": 96,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "num_hidden_layers": 6,
            "layer_types": _PERIOD * 2,
            "q_lora_rank": None,
            "linear_head_dim": 12,
            "linear_num_heads": 6,
        },
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        {
            **MOE,
            **LATENT,
            "intermediate_size": 96,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "linear_num_heads": 6,
            "num_expert_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "num_hidden_layers": 6,
            "layer_types": _PERIOD * 2,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MOE,
            **_SSM,
            **_MAMBA2,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "shared_intermediate_size": 40,
            "num_hidden_layers": 6,
            "layer_types": _PERIOD * 2,
            "residual_multiplier": 0.5,
        },
    ),
    "bamba": (
        "bamba",
        {
            **_SSM,
            **_MAMBA2,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "attn_layer_indices": [2, 5],
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_SSM,
            **_MAMBA2,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "num_attention_heads": 6,
            "intermediate_size": 96,
            "mamba_d_ssm": 120,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **MOE,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "intermediate_size": 96,
            "mamba_num_heads": 6,
            "mamba_head_dim": 20,
            "n_groups": 2,
            "ssm_state_size": 12,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_hidden_layers": 8,
            "moe_shared_expert_intermediate_size": 40,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"] * 2,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "num_hidden_layers": 6,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 12,
            "n_groups": 2,
            "chunk_size": 8,
            "expand": 2,
            "initializer_range": 0.02,
        },
    ),
}
