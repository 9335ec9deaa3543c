"""Checkpoints that somebody has quantized: in which format, and whether it is one that is read, told before any weight is.

Read as if they were plain, some of them would load, and answer noise. Knows how such a format shows, in a configuration and in
the names of tensors. Does not know how any of them is decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from petals_win.errors import UserError
from petals_win.models.architecture import text_config
from petals_win.models.packed.described import format_of
from petals_win.models.packed.format import Format

_FIELDS = ("quantization_config", "compression_config", "quantization")
_UNNAMED = "a method that its config.json does not name"

# What the formats call the tensors that they put beside, or in the place of, a weight.
_COMPANIONS = frozenset(
    "SCB absmax act_scale activation_scale bias_scale g_idx input_scale nested_absmax nested_quant_map output_scale qscales "
    "quant_map quant_state qweight qzeros scale scale_inv scales scaling_factors weight_blocks weight_format weight_g_idx "
    "weight_global_scale weight_packed weight_scale weight_scale_2 weight_scale_inv weight_scales weight_shape "
    "weight_zero_point zero_point zeros".split()
)


def take_format(name: str, config: PreTrainedConfig) -> Format | None:
    """In which format the weights of the model `name` are; None if they are plain. Afterwards `config` says that they are plain.

    Raises UserError if it is none that is read here.
    """
    formats: list[Format] = []
    for part in (config, text_config(config)):
        for field in _FIELDS:
            described = getattr(part, field, None)
            described = described if isinstance(described, Mapping) else _as_mapping(described)
            method = _method(described)
            if method is None:
                continue
            found = format_of(method.partition(" ")[0], described)
            if found is None or formats:
                form = f" ({described['format']})" if isinstance(described.get("format"), str) else ""
                raise UserError(_refusal(name, f"quantized by {method}{form}"))
            formats.append(found)
            delattr(part, field)
    return formats[0] if formats else None


def check_nothing_left_over(name: str, leftover: Iterable[str], known: Collection[str]) -> frozenset[str]:
    """Raise a UserError if a tensor that the model has no use for belongs to one of its weights.

    `leftover` are names of the checkpoint's tensors, `known` the names of what is loaded, both as the model and as the
    checkpoint has them. What belongs to no weight (rotary tables, masks, layers for images or for guessing ahead) may be left
    over. Returns those of `leftover` that may be so only if all their values are zero: biases where the model has none.
    """
    modules = {parameter.rpartition(".")[0] for parameter in known}
    biases = set()
    for key in sorted(leftover):
        owner = _owner(key, known, modules)
        if owner is None:
            continue
        if key == f"{owner}.bias":
            biases.add(key)
        elif _is_companion(key):
            how = f"quantized by {_UNNAMED}: beside {owner} there is the tensor {key}"
            raise UserError(_refusal(name, how))
        else:
            raise UserError(no_place_for(name, key))
    return frozenset(biases)


def no_place_for(name: str, key: str) -> str:
    """The sentence for a tensor without which answers would be wrong, but which the model does not have."""
    return (
        f"The checkpoint of {name} has the tensor {key}, but the model that its config.json describes has not, and answers "
        "without it would be wrong. Download the model again, with all of its files, or choose another."
    )


def refuse_dtype(name: str, key: str, dtype: str) -> UserError:
    """The error for a weight that is stored in a type that is no plain floating-point number, such as F8_E4M3."""
    return UserError(_refusal(name, f"quantized: the tensor {key} is stored as {dtype}"))


def _refusal(name: str, how: str) -> str:
    return (
        f"The weights of {name} are {how}, which petals-win does not read. Take the model's 16-bit safetensors files instead, "
        "which a node quantizes itself with --quant int4, or a GGUF file of it."
    )


def _as_mapping(described: Any) -> Mapping[str, Any]:
    return described.to_dict() if hasattr(described, "to_dict") else {}


def _method(described: Mapping[str, Any]) -> str | None:
    """What the configuration calls the method; None if nothing is quantized."""
    if not described:
        return None
    bits = [number for number, field in ((8, "load_in_8bit"), (4, "load_in_4bit")) if described.get(field)]
    method = described.get("quant_method") or ("bitsandbytes" if bits else None)
    if method is None:
        return _UNNAMED
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes" and {"load_in_8bit", "load_in_4bit"} & described.keys():
        return f"{method} to {bits[0]} bits" if bits else None
    return method


def _owner(key: str, known: Collection[str], modules: Collection[str]) -> str | None:
    """The weight, or the module with weights, that the tensor `key` belongs to."""
    for end in range(len(key) - 1, 0, -1):
        if key[end] not in "._":
            continue
        before = key[:end]
        if before in known:
            return before
        if key[end] == "." and (f"{before}.weight" in known or (before in modules and _is_companion(key))):
            return before
    return None


def _is_companion(key: str) -> bool:
    last = key.rpartition(".")[2]
    return last in _COMPANIONS or last.endswith(("_scale", "_scales", "_scale_inv", "_blocks", "_packed"))
