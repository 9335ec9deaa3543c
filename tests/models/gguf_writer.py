"""Writes models of transformers into GGUF files as llama.cpp's converters do: their names, orders of rows and keys."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from transformers import PreTrainedModel

# transformers' type of model → llama.cpp's architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "granite": "granite",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "olmo2": "olmo2",
    "gemma": "gemma",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "nemotron": "nemotron",
    "falcon": "falcon",
    "gpt2": "gpt2",
    "bloom": "bloom",
    "smollm3": "smollm3",
    "glm4": "glm4",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ministral3": "mistral3",
}
_DEEPSEEK = ("deepseek_v2", "deepseek_v3")
_PAIRED = ("llama", "mistral", "mixtral", "granite", "smollm3", "ministral3")
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")
_HEAD_NAMES = ("lm_head.weight",)

# A vocabulary of control tokens, the alphabet of bytes and a few words, as many as a family's model has embeddings.
END_OF_TEXT, BEGIN, END_OF_TURN, CALL = range(4)


def byte_alphabet() -> list[str]:
    """How byte-level vocabularies spell the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def vocabulary(size: int, control: list[str] | None = None) -> dict[str, Any]:
    """The keys of a byte-level tokenizer of `size` tokens, with the merges of "Paris"."""
    control = control or ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
    words = ["Pa", "ri", "ris", "Paris"]
    tokens = [*control, *byte_alphabet(), *words]
    tokens += [f"<unused{index}>" for index in range(size - len(tokens))]
    types = [3] * len(control) + [1] * (256 + len(words)) + [5] * (size - len(control) - 256 - len(words))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["P a", "r i", "ri s", "Pa ris"],
        "tokenizer.ggml.bos_token_id": BEGIN,
        "tokenizer.ggml.eos_token_id": END_OF_TEXT,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
    raw: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write `model` with its hyperparameters. `keys` are added or replace what a converter writes (those that begin with a dot
    are below the architecture's name), `tensors` are added, the keys and tensors in `without` are left out, and of the
    tensors only those named in `only` are written, if it is given. Tensors in `raw` are given as bytes of these types.
    """
    kind = model.config.model_type
    architecture = ARCHITECTURES[kind]
    stored = {**hyperparameters(model.config), **vocabulary(model.config.vocab_size)}
    stored |= {f"{architecture}{key}" if key.startswith(".") else key: value for key, value in (keys or {}).items()}
    writer = GGUFWriter(path, architecture)
    for key, value in stored.items():
        if key not in without and key.removeprefix(architecture) not in without:
            add_key(writer, key, value)
    for name, tensor in {**_tensors(model, architecture), **(tensors or {})}.items():
        if name not in without and (only is None or name in only):
            writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=(raw or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_quantized(
    model: PreTrainedModel,
    path: Path,
    kind: GGMLQuantizationType,
    but: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write `model` with those of its blocks' matrices whose rows hold blocks of `kind` in that type.

    `but` has other types of some, and types of matrices outside of blocks, by the part of the name that says which, such as "ffn_down".
    Types that the gguf package does not write get random levels.
    """
    data, raw = {}, {}
    for name, tensor in _tensors(model, ARCHITECTURES[model.config.model_type]).items():
        *block, part, _ = name.rsplit(".", 2)
        this = (but or {}).get(part, kind if block else None)
        if this is not None and tensor.ndim > 1 and "gate_inp" not in part:
            if tensor.shape[-1] % GGML_QUANT_SIZES[this][0] == 0:
                raw[name], data[name] = this, _in_type(np.ascontiguousarray(tensor), this)
    return write_gguf(model, path, tensors=data, raw=raw)


def _in_type(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind not in _SCALES_OF_BLOCKS:
        return quantize(values, kind)
    per_block, size = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(values.size)
    blocks = draw.integers(0, 256, (values.size // per_block, size), dtype=np.uint8)
    for start in _SCALES_OF_BLOCKS[kind]:
        scales = draw.uniform(1e-4, 3e-4, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


# Where in a block of bytes there are numbers of 16 bits.
_SCALES_OF_BLOCKS = {GGMLQuantizationType.Q4_K: (0, 2), GGMLQuantizationType.Q6_K: (208,)}


def hyperparameters(config: Any) -> dict[str, Any]:
    """What the converter of this kind of model writes besides the tokenizer."""
    kind = config.model_type
    if kind == "gemma4_text":  # blocks differ: what each has is told by the keys of its own converter
        config = copy.copy(config)
        config.allow_global_per_layer_attribute_access = True
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = rope = rope.get("full_attention", rope)
    eps = next(
        (
            getattr(config, name)
            for name in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
            if hasattr(config, name)
        ),
        None,
    )
    found = {
        "context_length": next(
            (
                getattr(config, name)
                for name in ("max_position_embeddings", "n_positions", "seq_length")
                if hasattr(config, name)
            ),
            2048,
        ),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _feed_forward(config),
        "attention.head_count": heads,
        "attention.head_count_kv": _groups(config),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": eps,
        "rope.freq_base": rope.get("rope_theta"),
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "head_dim", None) and kind not in ("falcon", "stablelm", *_DEEPSEEK):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if kind in (
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "stablelm",
        "nemotron",
        "granite",
        "cohere2",
        "minimax_m2",
        "glm4",
        "smollm3",
    ):
        found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1))
    if kind == "stablelm":
        found["use_parallel_residual"] = config.use_parallel_residual
    if kind in ("phi3", "gemma2", "gemma3_text", "cohere2", "gpt_oss"):
        found["attention.sliding_window"] = config.sliding_window or 0
    if kind == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    if kind in ("qwen2_moe", "qwen3_moe"):
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind in ("mixtral", "gpt_oss", "minimax_m2"):
        found |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if kind in ("gpt_oss", "minimax_m2"):
        found["expert_feed_forward_length"] = config.intermediate_size
    if kind == "minimax_m2":
        found["expert_gating_func"] = 2
    if kind == "granite":
        found |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        found |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if kind in ("cohere", "cohere2"):
        found |= {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
    if kind == "qwen2_moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind in _DEEPSEEK:
        found |= _of_deepseek(config)
    if kind == "gemma3n_text":
        found |= _of_gemma3n(config)
    if kind == "gemma4_text":
        found |= _of_gemma4(config)
    if kind == "ministral3":
        found["attention.temperature_scale"] = scaling["llama_4_scaling_beta"]
        found["rope.scaling.yarn_log_multiplier"] = float(scaling["mscale_all_dim"])
    if scaling.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
        if "original_max_position_embeddings" in scaling:
            found["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return {f"{ARCHITECTURES[kind]}.{key}": value for key, value in found.items() if value is not None}


def _of_deepseek(config: Any) -> dict[str, Any]:
    latent = config.kv_lora_rank
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + config.qk_rope_head_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": latent,
        "attention.q_lora_rank": config.q_lora_rank,
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_shared_count": config.n_shared_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "leading_dense_block_count": config.first_k_dense_replace,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def _of_gemma3n(config: Any) -> dict[str, Any]:
    normal = torch.distributions.Normal(0, 1)
    return {
        "activation_sparsity_scale": normal.icdf(torch.tensor(config.activation_sparsity_pattern)).tolist(),
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
    }


def _of_gemma4(config: Any) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    by_block = [config.per_layer_config[index] for index in range(len(slides))]
    whole, windowed = (by_block[slides.index(slide)].head_dim for slide in (False, True))
    first = len(slides) - config.num_kv_shared_layers
    double = config.use_double_wide_mlp
    return {
        "attention.head_count_kv": [block.num_key_value_heads for block in by_block],
        "attention.key_length": whole,
        "attention.key_length_swa": windowed,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": slides,
        "attention.value_length": whole,
        "attention.value_length_swa": windowed,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "expert_count": config.num_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_used_count": config.top_k_experts,
        "feed_forward_length": [
            config.intermediate_size * (2 if double and index >= first else 1) for index in range(len(slides))
        ],
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": windowed,
        "rope.freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
    }


def _divisors_of_gemma4(config: Any) -> np.ndarray:
    """In blocks that see everything some dimensions stand still."""
    head_dim = config.per_layer_config[config.layer_types.index("full_attention")].head_dim
    turned = int(config.rope_parameters["full_attention"]["partial_rotary_factor"] * head_dim // 2)
    return np.array([1.0] * turned + [1e30] * (head_dim // 2 - turned), dtype=np.float32)


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """rope_freqs.weight: by what each frequency is divided."""
    found = []
    for exponent in np.arange(0, head_dim, 2) / head_dim:
        turns = context / (2 * np.pi * theta**exponent)
        share = np.clip((turns - low) / (high - low), 0, 1)
        found.append(1 / ((1 - share) / factor + share))
    return np.array(found, dtype=np.float32)


def _groups(config: Any) -> int | None:
    if config.model_type == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture else 1
    return getattr(config, "num_key_value_heads", None)


def _feed_forward(config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_hidden_size"):
        if getattr(config, name, None):
            return getattr(config, name)
    return 4 * config.hidden_size


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    kind = config.model_type
    number = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    stored: dict[str, np.ndarray] = {}
    if kind == "gemma4_text":
        stored["rope_freqs.weight"] = _divisors_of_gemma4(config)
    for name, tensor in model.state_dict().items():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.router\.(scale|per_expert_scale)", name):
            part = "ffn_gate_inp" if found[2] == "scale" else "ffn_down_exps"
            stored[f"blk.{found[1]}.{part}.scale"] = tensor.numpy()
            continue
        if found := re.fullmatch(r"model\.(altup_projections|altup_unembed_projections)\.(\d+)\.weight", name):
            whole = "altup_proj.weight" if found[1] == "altup_projections" else "altup_unembd_proj.weight"
            stored[whole] = np.concatenate([*([stored[whole]] if found[2] != "0" else []), tensor.numpy()[None]])
            continue
        if name in _HEAD_NAMES and config.tie_word_embeddings:
            continue
        if kind == "gpt_oss" and (found := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\w+)", name)):
            stored |= _experts_of_gpt_oss(found[1], found[2], tensor)
            continue
        if found := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj", name):
            gate, up = tensor.chunk(2, dim=1)
            stored[f"blk.{found[1]}.ffn_gate_exps.weight"] = gate.numpy()
            stored[f"blk.{found[1]}.ffn_up_exps.weight"] = up.numpy()
            continue
        if found := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.down_proj", name):
            stored[f"blk.{found[1]}.ffn_down_exps.weight"] = tensor.numpy()
            continue
        if name.endswith("e_score_correction_bias"):
            stored[f"blk.{name.split('.')[2]}.exp_probs_b.bias"] = tensor.numpy()
            continue
        if found := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.kv_b_proj\.weight", name):
            by_head = tensor.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            stored[f"blk.{found[1]}.attn_k_b.weight"] = keys.transpose(1, 2).numpy()
            stored[f"blk.{found[1]}.attn_v_b.weight"] = values.numpy()
            continue
        if name == "lm_head.weight":
            stored["output.weight"] = tensor.numpy()
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias")) or names.get_name(
            name.removeprefix("transformer."), try_suffixes=(".weight", ".bias")
        )
        assert target is not None, f"{architecture} has no name for {name}"
        if name.endswith((".correct_output_scale", ".layer_scalar", ".experts.gate_up_proj", ".experts.down_proj")):
            target += ".weight"
        stored[target] = _converted(kind, config, name, target, tensor).numpy()
    return stored


def _experts_of_gpt_oss(block: str, name: str, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    ending = "bias" if name.endswith("_bias") else "weight"
    if ending == "weight":
        tensor = tensor.transpose(1, 2)
    parts = {"down": tensor} if name.startswith("down") else {"gate": tensor[:, ::2], "up": tensor[:, 1::2]}
    return {f"blk.{block}.ffn_{part}_exps.{ending}": stored.numpy() for part, stored in parts.items()}


def _converted(kind: str, config: Any, name: str, target: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the converter of this kind of model stores it."""
    if kind in _PAIRED and (".attn_q." in target or ".attn_k." in target):
        heads = config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if kind in _NORMS_PLUS_ONE and target.endswith("norm.weight"):
        return tensor + 1
    if kind == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
        return tensor.T
    if kind == "falcon" and ".attn_qkv." in target and config.new_decoder_architecture:
        groups, heads = config.num_kv_heads, config.num_attention_heads
        by_group = tensor.reshape(groups, heads // groups + 2, -1, tensor.shape[1])
        parts = (by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:])
        return torch.cat([part.reshape(-1, tensor.shape[1]) for part in parts])
    if kind == "bloom" and ".attn_qkv." in target:
        by_head = tensor.reshape(config.n_head, 3, config.hidden_size // config.n_head, *tensor.shape[1:])
        return by_head.transpose(0, 1).reshape(tensor.shape)
    if target.endswith("ffn_gate_inp_shexp.weight"):
        return tensor.squeeze(0)
    return tensor
