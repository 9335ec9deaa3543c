"""Small models whose blocks carry recurrent states: two periods of their kinds of blocks and more, heads of odd sizes."""

from __future__ import annotations

from span.families import COMMON, MOE

_GROUPED = dict(num_key_value_heads=2, intermediate_size=96, head_dim=24)
_PERIOD = ["linear_attention", "linear_attention", "full_attention"]
_DELTA = dict(
    linear_key_head_dim=12, linear_value_head_dim=20, linear_num_key_heads=2, linear_num_value_heads=6, layer_types=_PERIOD * 2
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
}
