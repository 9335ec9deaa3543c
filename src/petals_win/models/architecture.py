"""Where a decoder keeps its blocks, and which decoders cannot be cut into spans.

Knows the accessors that all models of transformers share. Knows no checkpoint and no single model's code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from petals_win.errors import UserError
from petals_win.models.eyes import without_eyes

_RECURRENT = "its blocks carry a recurrent state in a form of their own, which petals-win cannot keep"
_EMBEDDED = "its blocks share weights, and need the embeddings beside the previous block's output"
_ONE_BY_ONE = (
    "transformers drops what its blocks have seen when several tokens follow at once, so its answers would be wrong"
)
_LOOPED = "a token goes through some of its blocks several times"
_MORE = "its blocks need more than the previous block's output, in a form that petals-win does not pass on"
_DRAFTS = "it guesses ahead for another model, to whose keys and values its blocks attend"
_CHOICES = "its blocks choose what they attend to by more than petals-win keeps between tokens"
_IMAGES = "some of its blocks look at images, which a swarm does not pass on"
# Of what blocks keep between tokens: keys and values, and those that have recurrent states, too or instead.
ONLY_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention")
WITH_STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
_TWICE = ("longcat_flash",)  # models each of whose blocks attends twice, and is counted as two layers
_REFUSED = {
    "falcon_mamba": _ONE_BY_ONE,
    "jamba": _ONE_BY_ONE,
    "mamba": _ONE_BY_ONE,
    "minimax": _RECURRENT,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "zamba": _EMBEDDED,
    "zamba2": _EMBEDDED,
    "deepseek_v4": "its compressed attention keeps more than keys and values between tokens",
    "dory": _LOOPED,
    "inkling2_loop": _LOOPED,
    "inkling2_loop_text": _LOOPED,
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "glm5_next": _CHOICES,
    "glm5_next_text": _CHOICES,
    "hy_v4": _MORE,
    "hy_v4_vl": _MORE,
    "hy_v4_vl_text": _MORE,
    "mistral_large4": _CHOICES,
    "mistral_large4_text": _CHOICES,
    "qwen4_exp": _MORE,
    "qwen4_exp_text": _MORE,
    "mllama": _IMAGES,
    "mllama_text_model": _IMAGES,
}


@dataclass(frozen=True)
class Blocks:
    """The decoder of a model and the list of its blocks inside it."""

    decoder: PreTrainedModel
    list_name: str  # the attribute of the decoder that holds the list
    prefix: str  # of the parameters' names in the whole model, such as "model.layers."
    layers: nn.ModuleList


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of the configuration that describes the decoder of text."""
    return config.get_text_config(decoder=True)


def attentions_of_a_block(decoder_config: PreTrainedConfig) -> int:
    """How often each block attends, with keys and values of its own each time."""
    return 2 if decoder_config.model_type in _TWICE else 1


def num_blocks(decoder_config: PreTrainedConfig) -> int:
    """How many blocks a decoder with this configuration has. Raises AttributeError for one that does not say it."""
    return decoder_config.num_hidden_layers // attentions_of_a_block(decoder_config)


def queries_of_a_key(decoder_config: PreTrainedConfig) -> int:
    """How many heads share keys and values, in the first block if blocks differ."""
    first = decoder_config.per_layer_config[0]
    heads = getattr(first, "num_attention_heads", None) or 1
    return heads // (getattr(first, "num_key_value_heads", None) or heads)


def counted_in_blocks(decoder_config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy whose `num_hidden_layers` is how many blocks there are, as whoever cuts a model counts."""
    counted = copy.deepcopy(decoder_config)
    count = num_blocks(decoder_config)
    if counted.num_hidden_layers != count:
        counted.__class__ = type(type(counted).__name__, (type(counted),), {"num_hidden_layers": count})
    return counted


def check_supported(config: PreTrainedConfig) -> None:
    """Raise a UserError for an architecture that cannot be served in spans."""
    decoder = text_config(config)
    for model_type in (config.model_type, decoder.model_type):
        if model_type in _REFUSED:
            raise UserError(
                f"Models of the type {model_type} cannot be split over several PCs: {_REFUSED[model_type]}. "
                "Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
            )
    if config.is_encoder_decoder:
        raise UserError(
            f"Models of the type {config.model_type} have an encoder; petals-win runs decoders only. "
            "Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
        )
    if not isinstance(getattr(decoder, "num_hidden_layers", None), int):
        raise UserError(
            f"Models of the type {config.model_type} are built in a way that petals-win cannot split. "
            "Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
        )
    strange = set(kinds_of_blocks(decoder)) - {*ONLY_ATTENTION, *WITH_STATES}
    # Blocks that take keys and values of others (models/cuts.py) have the name of those that keep nothing.
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    if "store" in modes or "reuse" not in modes:
        strange -= {"dummy"}
    if strange:
        raise UserError(
            f"Models of the type {decoder.model_type} have blocks of the kind {', '.join(sorted(strange))}, which petals-win "
            "cannot serve yet. Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
        )


def kinds_of_blocks(decoder_config: PreTrainedConfig) -> list[str]:
    """For each block, by transformers' name, what it keeps between tokens."""
    return get_layer_types_and_kwargs(decoder_config)[0][:: attentions_of_a_block(decoder_config)]


def attention_windows(decoder_config: PreTrainedConfig) -> list[int | None]:
    """For each block the length of its sliding window in tokens; None: it sees all, or has no attention."""
    settings = get_layer_types_and_kwargs(decoder_config)[1][:: attentions_of_a_block(decoder_config)]
    return [setting.get("sliding_window") for setting in settings]


def chunked_blocks(decoder_config: PreTrainedConfig) -> list[bool]:
    """For each block whether its window is a chunk: a token sees those before it in its own chunk of so many tokens."""
    return [name == "chunked_attention" for name in kinds_of_blocks(decoder_config)]


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The whole model with its parameters on the meta device (no memory) and its buffers computed.

    Raises UserError if transformers has no such model.
    """
    if auto_class is AutoModelForCausalLM and type(config) not in AutoModelForCausalLM._model_mapping:
        auto_class = AutoModelForImageTextToText  # whose text is served alone
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(without_eyes(copy.deepcopy(config)), dtype=dtype)
    except ValueError as e:
        if "Unrecognized configuration class" not in str(e):
            raise
        raise UserError(
            f"Models of the type {config.model_type} do not generate text; petals-win runs decoders only. "
            "Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
        ) from e
    if text_config(model.config) is not model.config:
        _leave_text_alone(model)
    return model.eval().requires_grad_(False)


def _leave_text_alone(model: PreTrainedModel) -> None:
    """Take out what reads images or sound, which no text passes through: its weights are neither counted nor loaded."""
    base, decoder = model.base_model, decoder_of(model)
    if base is decoder:
        return
    for name, child in base.named_children():
        embeds_ids = hasattr(
            child, "vocab_offset"
        )  # token ids of its own, which the whole model asks it for with any text
        has_text = embeds_ids or any(module is decoder for module in child.modules())
        if not has_text and any(True for _ in child.parameters()):
            setattr(base, name, None)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module that has the blocks as a child. Raises UserError if there is none that can be told by the number of blocks."""
    for module in model.get_decoder().modules():  # some call a model with a head their decoder
        if isinstance(module, PreTrainedModel) and len(_lists_of_blocks(module)) == 1:
            return module
    raise UserError(
        f"Models of the type {model.config.model_type} are built in a way that petals-win cannot split. "
        "Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
    )


def _lists_of_blocks(decoder: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    if not isinstance(getattr(decoder.config, "num_hidden_layers", None), int):
        return []
    count = num_blocks(decoder.config)
    return [
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]


def find_blocks(model: PreTrainedModel) -> Blocks:
    """Find the list of blocks. Raises UserError as `decoder_of` does."""
    decoder = decoder_of(model)
    ((name, layers),) = _lists_of_blocks(decoder)
    path = next(path for path, module in model.named_modules() if module is layers)
    return Blocks(decoder, name, f"{path}.", layers)


def config_of_blocks(decoder_config: PreTrainedConfig, start: int, end: int) -> PreTrainedConfig:
    """A copy of the decoder's configuration that speaks of the blocks [start, end) alone."""
    count = decoder_config.num_hidden_layers
    part = copy.deepcopy(decoder_config)
    for name, value in vars(decoder_config).items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(part, name, value[start:end])
    part.num_hidden_layers = (end - start) * attentions_of_a_block(decoder_config)
    # What is computed from the number of a block would be that of the first ones.
    whole = {name: getattr(decoder_config, name) for name in _computed_lists(decoder_config)}
    wrong = {
        name: list(value[start:end])
        for name, value in whole.items()
        if len(value) == count and getattr(part, name) != value[start:end]
    }
    if wrong:
        part.__class__ = type(type(part).__name__, (type(part),), wrong)
    return part


def _computed_lists(config: PreTrainedConfig) -> list[str]:
    names = {
        name for kind in type(config).__mro__ for name, value in vars(kind).items() if isinstance(value, property)
    }
    return sorted(name for name in names if name.startswith("layer") and isinstance(getattr(config, name), list))
