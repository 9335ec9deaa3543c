"""Tensors of GGUF files that are stored otherwise than in transformers, and that transformers' own reader leaves as they are.

Knows, for each type of model, which stored tensors make up which of the model's, and how. Does not know files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_EXPERTS = re.compile(r"(?P<block>.*\.(?P<index>\d+)\.mlp)\.experts\.(?P<part>gate_up|down)_proj(?P<bias>_bias)?")
_DEEPSEEK = ("deepseek_v2", "deepseek_v3")
_FUSED_EXPERTS = ("gpt_oss", "mixtral", *_DEEPSEEK)
_LATENT = re.compile(r".*\.(?P<index>\d+)\.self_attn\.kv_b_proj\.weight")
# Architectures whose rows of queries and keys lie in pairs, those of Llama aside, which transformers knows.
_PAIRED = ("granite", "mistral3", "smollm3")


# Of Gemma 4: names that the file has for parameters that are no weights of linear layers or norms.
_GEMMA4 = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
_GEMMA4_EXPERTS = re.compile(r".*\.(?P<index>\d+)\.experts\.gate_up_proj")
# Of Gemma 3n: tensors of the file that are several parameters, one behind the other.
SEVERAL = {"altup_proj": "altup_projections", "altup_unembd_proj": "altup_unembed_projections"}
_SEVERAL = re.compile(rf"(?P<before>.*\.)(?P<name>{'|'.join(SEVERAL.values())})\.(?P<index>\d+)\.weight")
_OWN_KEYS = re.compile(r"blk\.(?P<index>\d+)\.attn_(k|v|k_norm)\.weight")


def is_left_out(config: Any, stored: str) -> bool:
    """Whether this tensor is of keys and values of a block that takes those of another one; files have them all the same."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    found = _OWN_KEYS.fullmatch(stored)
    return found is not None and int(found["index"]) < len(modes) and modes[int(found["index"])] == "reuse"


def further_names(model_type: str, parameters: Iterable[str]) -> dict[str, str]:
    """By the name in the file, the model's name of each tensor that the gguf package's mapping of names lacks."""
    found = {}
    for name in parameters:
        if name == "lm_head.weight":
            found["output.weight"] = (
                name  # llama.cpp's lists leave out the heads of models that have none of their own
            )
        elif model_type == "gemma3n_text" and (one := _SEVERAL.fullmatch(name)):
            stored_as = next(stored for stored, ours in SEVERAL.items() if ours == one["name"])
            found[f"{stored_as}.{one['index']}.weight"] = name
        elif model_type == "gemma4_text" and (fused := _GEMMA4_EXPERTS.fullmatch(name)):
            found |= {f"blk.{fused['index']}.ffn_{part}_exps.weight": name for part in ("gate", "up")}
        elif model_type == "gemma4_text" and (stored := _GEMMA4.get(".".join(name.split(".")[3:]))):
            found[f"blk.{name.split('.')[2]}.{stored}"] = name
        elif model_type in _FUSED_EXPERTS and (experts := _EXPERTS.fullmatch(name)):
            ending = "bias" if experts["bias"] else "weight"
            for part in ("gate", "up") if experts["part"] == "gate_up" else ("down",):
                found[f"blk.{experts['index']}.ffn_{part}_exps.{ending}"] = name
        elif model_type in _DEEPSEEK and (latent := _LATENT.fullmatch(name)):
            found |= {f"blk.{latent['index']}.attn_{part}_b.weight": name for part in ("k", "v")}
        elif model_type in _DEEPSEEK and name.endswith(".e_score_correction_bias"):
            found[f"blk.{name.split('.')[2]}.exp_probs_b.bias"] = name
    return found


def restored(
    architecture: str, model_type: str, config: Mapping[str, Any], target: str, parts: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """The model's tensor `target` from those stored in a file of `architecture`; None if nothing special is to be done with it."""
    if model_type in _FUSED_EXPERTS and (experts := _EXPERTS.fullmatch(target)):
        order = {name.split(".")[2].removeprefix("ffn_").removesuffix("_exps"): part for name, part in parts.items()}
        halves = [order[part] for part in (("gate", "up") if experts["part"] == "gate_up" else ("down",))]
        if model_type != "gpt_oss":
            return np.concatenate(halves, axis=1)
        # rows of gate and up take turns, and inputs come before outputs
        woven = np.stack(halves, axis=2).reshape(len(halves[0]), -1, *halves[0].shape[2:])
        return woven if experts["bias"] else woven.swapaxes(1, 2)
    if model_type == "gemma4_text" and _GEMMA4_EXPERTS.fullmatch(target) and len(parts) > 1:
        return np.concatenate([part for _, part in sorted(parts.items())], axis=1)  # gate comes before up
    if model_type == "gemma" and target.endswith("norm.weight"):
        return _only(parts) - 1
    if model_type in _DEEPSEEK and _LATENT.fullmatch(target) and len(parts) > 1:
        return _latent(parts)
    if architecture in _PAIRED and re.search(r"\.[qk]_proj\.(weight|bias)$", target):
        kind = "num_attention_heads" if ".q_proj." in target else "num_key_value_heads"
        rows = _only(parts)
        pairs = rows.reshape(config[kind], -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)
    if model_type == "falcon" and target.endswith("query_key_value.weight"):
        return _by_group(_only(parts), config["num_attention_heads"], config["num_kv_heads"])
    return None


def _latent(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """What makes a head's key, which is stored for being multiplied from the other side, and what makes its value."""
    by_part = {name.split(".")[2]: part for name, part in parts.items()}
    if "attn_kv_b" in by_part:  # some files have both forms
        return by_part["attn_kv_b"]
    both = np.concatenate([by_part["attn_k_b"].swapaxes(1, 2), by_part["attn_v_b"]], axis=1)
    return both.reshape(-1, both.shape[-1])


def _by_group(rows: np.ndarray, heads: int, groups: int) -> np.ndarray:
    """All queries, all keys, all values → the queries of a group, its key, its value, the next group."""
    by_head = rows.reshape(heads + 2 * groups, -1, *rows.shape[1:])
    queries, keys, values = np.split(by_head, [heads, heads + groups])
    queries = queries.reshape(groups, heads // groups, *queries.shape[1:])
    return np.concatenate([queries, keys[:, None], values[:, None]], axis=1).reshape(rows.shape)


def _only(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    (part,) = parts.values()
    return part
