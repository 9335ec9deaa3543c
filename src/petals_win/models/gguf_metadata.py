"""What a GGUF file's metadata says about the computation, in the words of transformers' configurations.

Knows, for each architecture, which key means what and what llama.cpp takes for granted there. Whatever it does not know by
name it refuses, since a number that is left out gives wrong answers without a word. Does not know files or tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from petals_win.errors import UserError
from petals_win.models.transformers_internals import inverse_frequencies

ROPE_DIVISORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TABLES = (ROPE_DIVISORS, _LONG, _SHORT)  # tensors that say how the rotary embedding is scaled

_LARGEST = 2**24  # of any size: ten million tokens are the longest context there is, and a damaged file says anything
_BY_LAYER = "per_layer_token_embd.weight"  # the table of inputs that each block gets for itself
_STANDS_STILL = 1e20  # a divisor by which no text that there is turns anything
_HUGE = 1e12  # of any number that is no size: bases of rotary embeddings come near it
_NOT_YET = "which petals-win cannot follow yet. Use the model's safetensors files instead."

# By a key behind the architecture's name. Their values go into the configuration as they are.
_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LOCAL_EXPERTS = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "intermediate_size",
}

# Read by functions below, or known to change nothing.
_ROPE = {
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_HEADS = {"attention.key_length", "attention.value_length"}
_WINDOW = {"attention.sliding_window", "attention.sliding_window_pattern"}
_TEXTS = {"rope.scaling.type", "tensor_data_layout"}  # all others are numbers
_HARMLESS = {"vocab_size", "tensor_data_layout"}

# Values with which a key says no more than its absence.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),  # 1 is softmax, as everywhere here but where a family says otherwise
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
}


@dataclass(frozen=True)
class _Family:
    """One architecture of llama.cpp. `adjust` puts in what no key says, and may refuse."""

    model_type: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    head_dim: bool = True  # whether heads may have another size than hidden_size / num_attention_heads
    partial_rotary: bool = False
    longrope: bool = False  # whether there may be two sets of divisors, for short texts and for long ones
    latent: bool = False  # whether keys and values come out of one latent vector, so that heads have no single size
    theta: float | None = 10_000.0  # base of the rotary embedding if no key says it; None: there is no such embedding
    window: int | None = None  # every how many blocks one sees everything (1: none does); None: no block has a window
    adjust: Callable[[dict[str, Any], _Reader], None] | None = None
    read: frozenset[str] = frozenset()  # further keys that `adjust` reads, or that change nothing here
    by_block: frozenset[str] = frozenset()  # of _COMMON, keys whose lists of a number for each block `adjust` reads


class _Reader:
    """The metadata of one file below its architecture, and the shapes of its tensors, outermost dimension first."""

    def __init__(
        self, metadata: Mapping[str, Any], shapes: Mapping[str, list[int]], tables: Mapping[str, np.ndarray]
    ) -> None:
        self.architecture: str = metadata["general.architecture"]
        prefix = f"{self.architecture}."
        self.values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self.shapes = shapes
        divisors = tables.get(ROPE_DIVISORS)
        self.divisors = None if divisors is None or bool(np.all(divisors == 1)) else divisors
        self.tables = tables

    def get(self, key: str, default: Any = None) -> Any:
        """A number or text; of a list whose entries are all equal, the entry. Raises UserError for a list of several."""
        value = self.values.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refusal(key, "differs from block to block")
            value = value[0]
        if isinstance(value, bool) or value is None or (isinstance(value, str) and key in _TEXTS):
            return value
        limit = _LARGEST if isinstance(value, int) else _HUGE
        if isinstance(value, str) or key in _TEXTS or not 0 <= value <= limit:
            raise UserError(f"{self.architecture}.{key} is {value!r}: the file is damaged. Download it again.")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.999999747378752e-06

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise self.lacks(key)
        return value

    def of_blocks(self, key: str) -> list[int]:
        """A number for each block, which the key has as a list, or once for all. Raises UserError for anything else."""
        value, count = self.values.get(key), self.need("block_count")
        found = value if isinstance(value, list) else [self.need(key)] * count
        if len(found) != count or not all(type(each) is int and 0 <= each <= _LARGEST for each in found):
            raise self.refusal(key)
        return found

    def lacks(self, key: str) -> UserError:
        return UserError(
            f"The file lacks {self.architecture}.{key}, without which the model cannot be computed. "
            "Download another version of it, or use the model's safetensors files."
        )

    def refusal(self, key: str, says: str | None = None) -> UserError:
        value = self.values.get(key)
        return UserError(f"{self.architecture}.{key} {says or f'is {value!r}'}, {_NOT_YET}")

    def has_tensor(self, ending: str) -> bool:
        return any(name.endswith(ending) for name in self.shapes)


def check_architecture(architecture: str) -> None:
    """Raises UserError for an architecture that is not read from GGUF files."""
    if architecture not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UserError(
            f"Models of the architecture {architecture} cannot be read from a GGUF file. Use the model's safetensors files "
            f"instead. What can be read: {known}."
        )


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, list[int]], tables: Mapping[str, np.ndarray] | None = None
) -> PreTrainedConfig:
    """The configuration with which transformers computes what the file describes.

    `metadata` has the file's keys (no arrays of text are needed), `shapes` its tensors as torch counts, `tables` the values
    of those tensors that are in ROPE_TABLES. Raises UserError, with the key, for what cannot be computed here.
    """
    check_architecture(metadata["general.architecture"])
    reader = _Reader(metadata, shapes, tables or {})
    family = _FAMILIES[reader.architecture]
    settings: dict[str, Any] = dict(family.fixed)
    for key, name in {**_COMMON, **family.keys}.items():
        if key not in family.by_block and (value := reader.get(key)) is not None:
            settings[name] = value
    _check_shape(settings, reader)
    head_dim = reader.need("rope.dimension_count") if family.latent else _head_dim(settings, family, reader)
    _windows(settings, family, reader)
    settings["model_type"] = family.model_type
    settings["vocab_size"] = reader.shapes["token_embd.weight"][0]
    settings["tie_word_embeddings"] = "output.weight" not in reader.shapes
    for name in ("bos", "eos", "padding"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        known = isinstance(token, int) and 0 <= token < settings["vocab_size"]
        settings[f"{name.removesuffix('ding')}_token_id"] = token if known else None
    if family.theta is not None:
        settings["rope_parameters"] = _rope(settings, head_dim, family, reader)
    if family.adjust is not None:
        family.adjust(settings, reader)
    _refuse_the_rest(family, reader, head_dim)
    config = AutoConfig.for_model(**settings)
    _check_divisors(config, reader)
    return config


def _check_shape(settings: dict[str, Any], reader: _Reader) -> None:
    """The number of blocks and the width are what the tensors say, so that no damaged number builds a model of any size."""
    for key in ("block_count", "embedding_length", "attention.head_count"):
        if not reader.need(key):
            raise reader.refusal(key)
    embedding = reader.shapes.get("token_embd.weight", [])
    if len(embedding) != 2 or embedding[1] != reader.need("embedding_length"):
        raise UserError("The file has no table of embeddings as wide as it says: it is damaged. Download it again.")
    blocks = {name.split(".")[1] for name in reader.shapes if name.startswith("blk.")}
    if blocks != {str(index) for index in range(min(reader.need("block_count"), len(blocks) + 1))}:
        raise UserError(
            f"The file says that it has {reader.need('block_count')} blocks, but has the tensors of {len(blocks)}. "
            "Download it again, or use the model's safetensors files."
        )
    settings.setdefault("num_key_value_heads", reader.need("attention.head_count"))


def _head_dim(settings: dict[str, Any], family: _Family, reader: _Reader) -> int:
    usual = reader.need("embedding_length") // reader.need("attention.head_count")
    head_dim = reader.get("attention.key_length", usual)
    if not head_dim:
        raise reader.refusal("attention.key_length")
    if reader.get("attention.value_length", head_dim) != head_dim:
        raise reader.refusal("attention.value_length")
    if family.head_dim:
        settings["head_dim"] = head_dim
    elif head_dim != usual:
        raise reader.refusal("attention.key_length")
    return head_dim


def _windows(settings: dict[str, Any], family: _Family, reader: _Reader) -> None:
    if family.window is None:
        return
    window = reader.get("attention.sliding_window", settings.get("sliding_window")) or None
    settings["sliding_window"] = window
    if family.window == 1:
        if reader.values.get("attention.sliding_window_pattern", 1) not in (1, True):
            raise reader.refusal("attention.sliding_window_pattern")
        return
    if window is None:
        raise reader.lacks("attention.sliding_window")
    count = settings["num_hidden_layers"]
    pattern = reader.values.get("attention.sliding_window_pattern", family.window)
    if isinstance(pattern, list) and len(pattern) == count:
        slides = [bool(entry) for entry in pattern]
    elif isinstance(pattern, int) and pattern > 0:
        slides = [(index + 1) % pattern != 0 for index in range(count)]
    else:
        raise reader.refusal("attention.sliding_window_pattern")
    settings["layer_types"] = ["sliding_attention" if entry else "full_attention" for entry in slides]


def _rope(settings: dict[str, Any], head_dim: int, family: _Family, reader: _Reader) -> dict[str, Any]:
    """The rotary embedding. What llama.cpp takes for granted: no type means linear, no factor means none."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": reader.get("rope.freq_base", family.theta)}
    rotary = reader.get("rope.dimension_count", head_dim) or head_dim
    if rotary != head_dim and not family.partial_rotary:
        raise reader.refusal("rope.dimension_count", f"is {rotary} where a head has {head_dim}")
    if family.partial_rotary:
        rope["partial_rotary_factor"] = rotary / head_dim
    if any(name.startswith("rope_factors_") for name in reader.shapes):
        return rope | _longrope(family, rotary, reader)
    kind = reader.get("rope.scaling.type", "linear")
    factor = reader.get("rope.scaling.factor") or reader.get("rope.scale_linear") or 1.0
    magnitude = reader.get("rope.scaling.attn_factor", 1.0) * reader.get("rope.scaling.yarn_attn_factor", 1.0)
    if kind == "yarn" and factor != 1:
        rope |= {"rope_type": "yarn", "factor": float(factor)}
        rope["original_max_position_embeddings"] = reader.get(
            "rope.scaling.original_context_length", reader.need("context_length")
        )
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := reader.get(f"rope.scaling.{key}")) is not None:
                rope[name] = value
        if magnitude != 1:
            rope["attention_factor"] = magnitude * (0.1 * math.log(factor) + 1)
        if reader.values.get("rope.scaling.yarn_ext_factor", 1) not in (1, -1):
            raise reader.refusal("rope.scaling.yarn_ext_factor")
    elif kind not in ("none", "linear", "yarn"):
        raise reader.refusal("rope.scaling.type")
    else:
        if kind == "linear" and factor != 1:
            rope |= {"rope_type": "linear", "factor": float(factor)}
        if magnitude != 1:
            raise reader.refusal("rope.scaling.attn_factor")
    if reader.divisors is not None:
        if rope["rope_type"] != "default":
            raise reader.refusal("rope.scaling.type", f"is {kind!r} beside {ROPE_DIVISORS}")
        rope |= _as_llama3(reader.divisors, rope["rope_theta"], rotary)
    return rope


def _longrope(family: _Family, rotary: int, reader: _Reader) -> dict[str, Any]:
    """Two sets of divisors: which of them counts, the length says up to which a text may go."""
    kind = reader.get("rope.scaling.type", "longrope")
    original = reader.get("rope.scaling.original_context_length")
    if not family.longrope or not original or kind not in ("none", "longrope") or reader.divisors is not None:
        raise UserError(f"The file scales its rotary embedding with two sets of factors (longrope), {_NOT_YET}")
    for name in (_LONG, _SHORT):
        table = reader.tables.get(name)
        if table is None or table.shape != (rotary // 2,) or not (np.isfinite(table) & (table > 0)).all():
            raise UserError(
                f"The tensor {name}, which scales the rotary embedding, is missing or does not fit: the file is damaged. "
                "Download it again."
            )
    return {
        "rope_type": "longrope",
        "long_factor": reader.tables[_LONG].tolist(),
        "short_factor": reader.tables[_SHORT].tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": float(reader.get("rope.scaling.attn_factor", 1.0)),
    }


def _as_llama3(divisors: np.ndarray, theta: float, rotary: int) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that give these divisors of the frequencies.

    Long waves are divided by the factor, short ones by 1; between them the share is linear in the context over the length
    of the wave. That line is all the file tells, so the original context is taken to be Llama 3's.
    """
    factor = float(divisors.max())
    context = 8192
    low, high = 1.0, 4.0
    between = (divisors > 1) & (divisors < factor)
    if divisors.shape == (rotary // 2,) and factor > 1 and between.sum() > 1:
        waves = 2 * math.pi * theta ** (np.arange(0, rotary, 2, dtype=np.float64) / rotary)
        share = (1 / divisors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(context / waves[between], share, 1)
        low, high = (round(float(value), 4) for value in (-offset / slope, (1 - offset) / slope))
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _check_divisors(config: PreTrainedConfig, reader: _Reader) -> None:
    """Whether the configuration's frequencies are the file's, to the accuracy of float32."""
    if reader.divisors is None:
        return
    rope = config.rope_parameters
    found = inverse_frequencies(config)
    rotary = 2 * len(found)
    wanted = 1 / (rope["rope_theta"] ** (np.arange(0, rotary, 2) / rotary))
    if reader.divisors.shape != found.shape or not np.allclose(found, wanted / reader.divisors, rtol=1e-5, atol=0):
        raise UserError(f"The file scales its rotary embedding by {ROPE_DIVISORS} in a way of its own, {_NOT_YET}")


def _refuse_the_rest(family: _Family, reader: _Reader, head_dim: int) -> None:
    known = {*_COMMON, *family.keys, *family.read, *_HEADS, *_HARMLESS}
    if family.window is not None:
        known |= _WINDOW
    if family.theta is not None:
        known |= _ROPE
    for key, value in reader.values.items():
        if key in known:
            continue
        if key == "attention.scale" and math.isclose(value * math.sqrt(head_dim), 1, rel_tol=1e-5):
            continue
        if key not in _NEUTRAL or reader.get(key) not in _NEUTRAL[key]:
            raise reader.refusal(key, f"is {str(value)[:60]}")


def _llama(settings: dict[str, Any], reader: _Reader) -> None:
    """Llama, Mistral and Mixtral."""
    if reader.get("expert_count"):
        settings |= {"model_type": "mixtral", "num_local_experts": reader.need("expert_count")}
        settings["num_experts_per_tok"] = reader.need("expert_used_count")
        return
    settings |= _biases(reader)
    if settings["sliding_window"] is None:
        del settings["sliding_window"]
    else:
        settings["model_type"] = "mistral"  # the same but for the window


def _biases(reader: _Reader) -> dict[str, bool]:
    return {"attention_bias": reader.has_tensor(".attn_q.bias"), "mlp_bias": reader.has_tensor(".ffn_up.bias")}


def _attention_bias(settings: dict[str, Any], reader: _Reader) -> None:
    settings["attention_bias"] = reader.has_tensor(".attn_q.bias")


def _granite(settings: dict[str, Any], reader: _Reader) -> None:
    settings |= _biases(reader)
    if settings.get("logits_scaling") == 0:
        raise reader.refusal("logit_scale")


def _phi3(settings: dict[str, Any], reader: _Reader) -> None:
    if settings["rope_parameters"]["rope_type"] not in ("default", "longrope"):
        raise reader.refusal("rope.scaling.type")  # transformers would take it for longrope
    if original := settings["rope_parameters"].get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = original


def _ministral3(settings: dict[str, Any], reader: _Reader) -> None:
    """Mistral's models of more than text. The newest ones sharpen queries from the original context's length on."""
    _llama(settings, reader)
    beta, magnitude = reader.get("attention.temperature_scale"), reader.get("rope.scaling.yarn_log_multiplier")
    if not beta and not magnitude:
        return
    rope = settings["rope_parameters"]
    if rope["rope_type"] != "yarn" or not beta or not magnitude or "attention_factor" in rope:
        raise reader.refusal("attention.temperature_scale" if beta else "rope.scaling.yarn_log_multiplier")
    rope |= {"llama_4_scaling_beta": beta, "mscale": 1.0, "mscale_all_dim": float(magnitude)}
    for unknown in ("attention_bias", "mlp_bias"):
        if settings.pop(unknown):
            raise UserError(f"The blocks of the file have biases in addition to a temperature, {_NOT_YET}")
    settings["model_type"] = "ministral3"


def _deepseek2(settings: dict[str, Any], reader: _Reader) -> None:
    """DeepSeek's second generation weighs experts by a softmax, the third (with Kimi K2 and others) by sigmoids."""
    rotary = reader.need("rope.dimension_count")
    whole = reader.get("attention.key_length_mla") or reader.need("attention.key_length")
    settings |= {
        "num_key_value_heads": settings["num_attention_heads"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": whole - rotary,
        "v_head_dim": reader.get("attention.value_length_mla") or reader.need("attention.value_length"),
        "kv_lora_rank": reader.need("attention.kv_lora_rank"),
        "q_lora_rank": reader.get("attention.q_lora_rank") or None,
        "n_routed_experts": reader.need("expert_count"),
        "n_shared_experts": reader.need("expert_shared_count"),
        "num_experts_per_tok": reader.need("expert_used_count"),
        "moe_intermediate_size": reader.need("expert_feed_forward_length"),
        "first_k_dense_replace": reader.get("leading_dense_block_count", 0),
        "routed_scaling_factor": float(reader.get("expert_weights_scale", 1.0)),
        "norm_topk_prob": bool(reader.get("expert_weights_norm", False)),
    }
    if whole <= rotary or not settings["n_routed_experts"] or not settings["n_shared_experts"]:
        raise UserError(f"The heads or experts of the file are of no size that DeepSeek's have, {_NOT_YET}")
    sigmoid = reader.get("expert_gating_func", 0)
    if sigmoid not in (0, 1, 2):
        raise reader.refusal("expert_gating_func")
    # Files made before there were keys for groups: those two models alone have them.
    usual = {(2, 256, 7168): (8, 4), (1, 160, 5120): (8, 3)}
    shape = (max(1, sigmoid), settings["n_routed_experts"], settings["hidden_size"])
    groups, used = usual.get(shape, (1, 1))
    settings["n_group"] = groups = reader.get("expert_group_count") or groups
    settings["topk_group"] = reader.get("expert_group_used_count") or used
    if sigmoid == 2:
        settings["model_type"] = "deepseek_v3"
    else:
        if settings["norm_topk_prob"]:
            raise reader.refusal("expert_weights_norm")
        settings["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"
    rope = settings["rope_parameters"]
    if rope["rope_type"] == "yarn":
        magnitude = 10 * reader.get("rope.scaling.yarn_log_multiplier", 0.0)
        if "attention_factor" in rope:
            raise reader.refusal("rope.scaling.attn_factor")
        rope |= {"mscale": magnitude, "mscale_all_dim": magnitude} if magnitude else {"attention_factor": 1.0}


def _cohere(settings: dict[str, Any], reader: _Reader) -> None:
    settings["attention_bias"] = reader.has_tensor(".attn_q.bias")
    settings["use_qk_norm"] = reader.has_tensor(".attn_q_norm.weight")


def _gpt_oss(settings: dict[str, Any], reader: _Reader) -> None:
    if settings["rope_parameters"]["rope_type"] == "yarn":
        settings["rope_parameters"]["truncate"] = False  # as its makers compute


def _expert_gating(wanted: int) -> Callable[[dict[str, Any], _Reader], None]:
    def check(settings: dict[str, Any], reader: _Reader) -> None:
        if reader.get("expert_gating_func", wanted) not in (0, wanted):
            raise reader.refusal("expert_gating_func")

    return check


def _shared_expert(settings: dict[str, Any], reader: _Reader) -> None:
    """Older files do not name the sizes of the experts, but have them."""
    for name, tensor, dimension in (
        ("moe_intermediate_size", "blk.0.ffn_up_exps.weight", 1),
        ("shared_expert_intermediate_size", "blk.0.ffn_up_shexp.weight", 0),
    ):
        if tensor in reader.shapes:
            settings.setdefault(name, reader.shapes[tensor][dimension])


def _query_scale(settings: dict[str, Any], largest: int) -> None:
    """No key says by what Gemma's queries are divided; llama.cpp knows the largest model of a generation by its blocks."""
    in_whole = settings["hidden_size"] // settings["num_attention_heads"]
    settings["query_pre_attn_scalar"] = in_whole if settings["num_hidden_layers"] == largest else settings["head_dim"]


def _gemma2(settings: dict[str, Any], reader: _Reader) -> None:
    _query_scale(settings, largest=46)


def _gemma3(settings: dict[str, Any], reader: _Reader) -> None:
    """Blocks with a window have a base of their own, which is never scaled."""
    _query_scale(settings, largest=62)
    local = {"rope_type": "default", "rope_theta": reader.get("rope.freq_base_swa", 10_000.0)}
    settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    if reader.divisors is not None:
        raise UserError(f"The file scales its rotary embedding by {ROPE_DIVISORS} in a way of its own, {_NOT_YET}")


def _gemma3n(settings: dict[str, Any], reader: _Reader) -> None:
    """Several streams, of which each block computes one; the last blocks take keys and values of others."""
    for key in (
        "attention.shared_kv_layers",
        "altup.active_idx",
        "altup.num_inputs",
        "attention.sliding_window_pattern",
    ):
        if key not in reader.values:
            raise reader.lacks(key)
    for name, tensor in (("laurel_rank", "blk.0.laurel_l.weight"), ("vocab_size_per_layer_input", _BY_LAYER)):
        if tensor not in reader.shapes:
            raise UserError(f"The file lacks the tensor {tensor}: it is damaged. Download it again.")
        settings[name] = reader.shapes[tensor][0]
    settings["intermediate_size"] = reader.of_blocks("feed_forward_length")
    sparsity = reader.values.get("activation_sparsity_scale")
    if not isinstance(sparsity, list) or len(sparsity) != settings["num_hidden_layers"]:
        raise reader.refusal("activation_sparsity_scale")
    # The file has deviations from the mean beyond which a number counts; -inf is where all do.
    settings["activation_sparsity_pattern"] = [round(NormalDist().cdf(float(each)), 6) for each in sparsity]
    local = {"rope_type": "default", "rope_theta": reader.get("rope.freq_base_swa", 10_000.0)}
    settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    if settings["rope_parameters"]["full_attention"]["rope_type"] != "default":
        raise reader.refusal("rope.scaling.type")


def _gemma4(settings: dict[str, Any], reader: _Reader) -> None:
    """Blocks with a window have heads and a rotary embedding of their own; the last blocks may take keys and values of others."""
    slides = [kind == "sliding_attention" for kind in settings["layer_types"]]
    if "attention.sliding_window_pattern" not in reader.values:
        raise reader.lacks("attention.sliding_window_pattern")
    first_sharing = len(slides) - settings.setdefault("num_kv_shared_layers", 0)
    settings["global_head_dim"] = settings["head_dim"]
    settings["head_dim"] = reader.need("attention.key_length_swa")
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if reader.get(key, settings["head_dim"]) != settings["head_dim"]:
            raise reader.refusal(key)
    if reader.get("rope.dimension_count", settings["global_head_dim"]) != settings["global_head_dim"]:
        raise reader.refusal("rope.dimension_count")

    own = [index for index, slide in enumerate(slides[:first_sharing]) if not slide]
    without = [index for index in own if f"blk.{index}.attn_v.weight" not in reader.shapes]
    if without and without != own:
        raise UserError(f"Some blocks of the file have values and others take their keys for them, {_NOT_YET}")
    settings["attention_k_eq_v"] = bool(without)

    heads = reader.of_blocks("attention.head_count_kv")
    of_kind = {slide: {count for count, each in zip(heads, slides, strict=True) if each is slide} for slide in slides}
    if any(len(counts) != 1 for counts in of_kind.values()):
        raise reader.refusal("attention.head_count_kv")
    settings["num_key_value_heads"] = next(iter(of_kind.get(True, of_kind[slides[-1]])))
    settings["num_global_key_value_heads"] = whole = next(iter(of_kind[False])) if False in of_kind else None
    if whole not in (None, settings["num_key_value_heads"]) and not settings["attention_k_eq_v"]:
        raise reader.refusal("attention.head_count_kv")

    widths = reader.of_blocks("feed_forward_length")
    settings["intermediate_size"] = width = widths[0]
    usual = [width] * first_sharing
    if widths not in (
        usual + [width] * (len(slides) - first_sharing),
        usual + [2 * width] * (len(slides) - first_sharing),
    ):
        raise reader.refusal("feed_forward_length")
    settings["use_double_wide_mlp"] = widths[-1] != width

    settings.setdefault("hidden_size_per_layer_input", 0)
    if table := reader.shapes.get(_BY_LAYER):
        settings["vocab_size_per_layer_input"] = table[0]
    if reader.get("expert_count"):
        settings |= {"enable_moe_block": True, "num_experts": reader.need("expert_count")}
        settings |= {"top_k_experts": reader.need("expert_used_count")}
        settings |= {"moe_intermediate_size": reader.need("expert_feed_forward_length")}
    settings["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": reader.get("rope.freq_base_swa", 10_000.0)},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": reader.get("rope.freq_base", 1_000_000.0),
            "partial_rotary_factor": _turned_part(settings["global_head_dim"], reader),
        },
    }


def _turned_part(head_dim: int, reader: _Reader) -> float:
    """Of a head's numbers those that the rotary embedding turns: the others have divisors by which they practically stand still."""
    divisors = reader.tables.get(ROPE_DIVISORS)
    turned = 0 if divisors is None else int(np.count_nonzero(divisors == 1))
    part = 2 * turned / head_dim
    if (
        divisors is None
        or divisors.shape != (head_dim // 2,)
        or not (divisors[:turned] == 1).all()
        or not (divisors[turned:] >= _STANDS_STILL).all()
        or int(part * head_dim // 2) != turned  # as transformers counts
    ):
        raise UserError(f"The file scales its rotary embedding by {ROPE_DIVISORS} in a way of its own, {_NOT_YET}")
    reader.divisors = None  # the configuration has them
    return part


def _stablelm(settings: dict[str, Any], reader: _Reader) -> None:
    settings["use_qkv_bias"] = reader.has_tensor(".attn_q.bias")
    settings["use_parallel_residual"] = not reader.has_tensor(".ffn_norm.weight")


def _falcon(settings: dict[str, Any], reader: _Reader) -> None:
    """The small ones share one key and value among all heads; the large ones have groups of heads."""
    groups = settings["num_kv_heads"] = settings.pop("num_key_value_heads")
    settings |= {"multi_query": groups == 1, "new_decoder_architecture": groups != 1}
    if groups != 1:
        settings["num_ln_in_parallel_attn"] = 2 if reader.has_tensor(".attn_norm_2.weight") else 1


def _ungrouped(settings: dict[str, Any], reader: _Reader) -> None:
    if settings.pop("num_key_value_heads") != settings["num_attention_heads"]:
        raise reader.refusal("attention.head_count_kv")


_FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama", _RMS, window=1, adjust=_llama, read=frozenset({"expert_count", "expert_used_count"})),
    "mistral3": _Family(
        "llama",
        _RMS,
        window=1,
        adjust=_ministral3,
        read=frozenset({"attention.temperature_scale", "rope.scaling.yarn_log_multiplier"}),
    ),
    "smollm3": _Family("smollm3", _RMS, {"no_rope_layer_interval": 4}, head_dim=False, adjust=_attention_bias),
    "glm4": _Family("glm4", _RMS, partial_rotary=True, adjust=_attention_bias),
    "deepseek2": _Family(
        "deepseek_v2",
        _RMS,
        latent=True,
        adjust=_deepseek2,
        read=frozenset(
            {
                "attention.key_length_mla",
                "attention.kv_lora_rank",
                "attention.q_lora_rank",
                "attention.value_length_mla",
                "expert_count",
                "expert_feed_forward_length",
                "expert_gating_func",
                "expert_group_count",
                "expert_group_used_count",
                "expert_shared_count",
                "expert_used_count",
                "expert_weights_norm",
                "expert_weights_scale",
                "leading_dense_block_count",
                "rope.scaling.yarn_log_multiplier",
            }
        ),
    ),
    "qwen2": _Family("qwen2", _RMS),
    "qwen3": _Family("qwen3", _RMS, adjust=_attention_bias),
    "qwen2moe": _Family(
        "qwen2_moe",
        {**_RMS, **_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"norm_topk_prob": False},
        adjust=_shared_expert,
    ),
    "qwen3moe": _Family("qwen3_moe", {**_RMS, **_EXPERTS}, {"norm_topk_prob": True}, adjust=_shared_expert),
    "phi3": _Family("phi3", _RMS, head_dim=False, partial_rotary=True, longrope=True, window=1, adjust=_phi3),
    "gemma": _Family("gemma", _RMS),
    "gemma2": _Family(
        "gemma2",
        {
            **_RMS,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        window=2,
        adjust=_gemma2,
    ),
    "gemma3": _Family(
        "gemma3_text",
        {**_RMS, "final_logit_softcapping": "final_logit_softcapping"},
        theta=1_000_000.0,
        window=6,
        adjust=_gemma3,
        read=frozenset({"rope.freq_base_swa"}),
    ),
    "gemma3n": _Family(
        "gemma3n_text",
        {
            **_RMS,
            "altup.active_idx": "altup_active_idx",
            "altup.num_inputs": "altup_num_inputs",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        theta=1_000_000.0,
        window=5,
        adjust=_gemma3n,
        read=frozenset({"activation_sparsity_scale", "rope.freq_base_swa"}),
        by_block=frozenset({"feed_forward_length"}),
    ),
    "gemma4": _Family(
        "gemma4_text",
        {
            **_RMS,
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        theta=None,
        window=6,
        adjust=_gemma4,
        read=frozenset(
            {
                "attention.key_length_swa",
                "attention.value_length_swa",
                "expert_count",
                "expert_feed_forward_length",
                "expert_used_count",
                "rope.dimension_count",
                "rope.dimension_count_swa",
                "rope.freq_base",
                "rope.freq_base_swa",
            }
        ),
        by_block=frozenset({"attention.head_count_kv", "feed_forward_length"}),
    ),
    "gpt-oss": _Family("gpt_oss", {**_RMS, **_LOCAL_EXPERTS}, theta=150_000.0, window=2, adjust=_gpt_oss),
    "minimax-m2": _Family(
        "minimax_m2",
        {**_RMS, **_LOCAL_EXPERTS},
        partial_rotary=True,
        adjust=_expert_gating(2),
        read=frozenset({"expert_gating_func"}),
    ),
    "granite": _Family(
        "granite",
        {
            **_RMS,
            "logit_scale": "logits_scaling",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
        },
        adjust=_granite,
    ),
    "command-r": _Family(
        "cohere",
        {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        head_dim=False,
        adjust=_cohere,
    ),
    "cohere2": _Family(
        "cohere2",
        {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        head_dim=False,
        window=4,
        adjust=_attention_bias,
    ),
    "olmo2": _Family("olmo2", _RMS, head_dim=False, adjust=_attention_bias),
    "starcoder2": _Family("starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}, head_dim=False, window=1),
    "stablelm": _Family(
        "stablelm",
        {"attention.layer_norm_epsilon": "layer_norm_eps"},
        head_dim=False,
        partial_rotary=True,
        adjust=_stablelm,
        read=frozenset({"use_parallel_residual"}),  # the tensors say it, too
    ),
    "nemotron": _Family(
        "nemotron", {"attention.layer_norm_epsilon": "norm_eps"}, partial_rotary=True, adjust=_attention_bias
    ),
    "falcon": _Family(
        "falcon",
        {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "ffn_hidden_size"},
        {"parallel_attn": True, "alibi": False, "bias": False},
        head_dim=False,
        adjust=_falcon,
    ),
    "gpt2": _Family(
        "gpt2",
        {
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "context_length": "n_positions",
            "feed_forward_length": "n_inner",
        },
        head_dim=False,
        theta=None,
        adjust=_ungrouped,
    ),
    "bloom": _Family(
        "bloom",
        {"attention.layer_norm_epsilon": "layer_norm_epsilon", "context_length": "seq_length"},
        head_dim=False,
        theta=None,
        adjust=_ungrouped,
    ),
}

# The types of models, in transformers' words, that GGUF files of these architectures hold.
MODEL_TYPES = frozenset(family.model_type for family in _FAMILIES.values()) | {
    "deepseek_v3",
    "ministral3",
    "mistral",
    "mixtral",
}
