"""From a checkpoint into a model on the meta device: only the tensors asked for.

Knows checkpoints and the loader of transformers. Does not know spans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from petals_win.errors import UserError
from petals_win.models.architecture import empty_model, text_config
from petals_win.models.quantized_checkpoint import check_nothing_left_over, no_place_for, refuse_dtype
from petals_win.models.transformers_internals import LazyTensor, Loader

if TYPE_CHECKING:
    from petals_win.models.source import ModelSource

logger = logging.getLogger(__name__)

# Settings of generation that need more than one sequence, more of a model than the next token, a cache or a tokenizer of
# transformers' own, with the values with which they ask for nothing.
_NOT_HERE = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "force_words_ids": None,
    "constraints": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "guidance_scale": 1.0,
    "cache_implementation": None,
    "cache_config": None,
    "compile_config": None,
    "prefill_chunk_size": None,
    "stop_strings": None,
    "token_healing": False,
    "max_time": None,
}


def model_to_fill(source: ModelSource, dtype: torch.dtype, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The whole model on the meta device, ready to generate as soon as it has its weights."""
    model = empty_model(source.config, dtype, auto_class)
    if model.can_generate():
        model.generation_config = source.generation_config() or model.generation_config
        one_answer_at_a_time(source.name, model.generation_config)
    return model


def one_answer_at_a_time(name: str, config: GenerationConfig) -> None:
    """Take out what no swarm does unless a call of generate() asks for it: the default is one sequence, token by token.

    The rule is that whatever chooses the next token from its logits holds, as do the tokens that end an answer.
    """
    asked = {key: getattr(config, key, None) for key in _NOT_HERE}
    asked = {key: value for key, value in asked.items() if value not in (None, _NOT_HERE[key])}
    for key in asked:
        setattr(config, key, _NOT_HERE[key] if key.startswith("num_") else None)
    if asked:
        told = ", ".join(f"{key} {value}" for key, value in asked.items())
        logger.warning("The generation_config.json of %s asks for %s, which is ignored", name, told)


def load_whole_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all of its weights, on the CPU."""
    model = model_to_fill(source, dtype)
    load_parts(source, model, [lambda _name: True], dtype=dtype, device=torch.device("cpu"))
    return model.requires_grad_(False)


def fetch_parts(source: ModelSource, wanted: Callable[[str], bool]) -> None:
    """Make sure that the parameters whose names `wanted` accepts can be read without a network. Raises UserError as load_parts does."""
    model = empty_model(source.config, source.dtype)
    loader = Loader(model, source.dtype)
    target_of = {key: loader.target(key) for key in source.checkpoint.tensors(model)}
    source.checkpoint.fetch(key for key, target in target_of.items() if wanted(target))


def load_parts(
    source: ModelSource,
    model: PreTrainedModel,
    parts: Sequence[Callable[[str], bool]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    take: Callable[[str, LazyTensor], bool] | None = None,
) -> None:
    """Fill those parameters of `model` whose names one of `parts` accepts, part after part, each tensor by itself. All are frozen.

    A head that is the embeddings becomes one tensor with them. `progress` gets the number of parts done and of all parts. `take` is
    offered each tensor that is to be a parameter as it is, by the parameter's name: what it takes stays out of the model.
    Raises UserError if the checkpoint lacks tensors, has some of another shape or more than belong there, or has weights that
    are no numbers.
    """
    loader = Loader(model, dtype)
    tensors = source.checkpoint.tensors(model)
    target_of = {key: loader.target(key) for key in tensors}
    biases = _check_left_over(source, loader, target_of)
    keys_of_parts = [[key for key, target in target_of.items() if part(target)] for part in parts]
    source.checkpoint.fetch(key for keys in keys_of_parts for key in keys)
    filled: set[str] = set()
    for done, keys in enumerate(keys_of_parts, start=1):
        for key in keys:
            if biases & {key, target_of[key]} and tensors[key][...].any():
                raise UserError(no_place_for(source.name, key))
        taken = {key for key in keys if take and loader.is_as_it_is(key) and take(target_of[key], tensors[key])}
        selected: dict[str, LazyTensor] = {
            key: _Weight(source.name, key, tensors[key]) if loader.takes_numbers(target_of[key]) else tensors[key]
            for key in keys
            if key not in taken
        }
        try:
            filled |= loader.load(selected, device) | {target_of[key] for key in taken}
        except ValueError as e:
            raise UserError(
                f"The weights of {source.name} do not fit its config.json: {e}. Download the model again, or choose another."
            ) from e
        model.requires_grad_(False)  # the new parameters are trainable, whatever those in whose place they are were
        if progress is not None:
            progress(done, len(parts))
    wanted = {name for name in loader.expected_names if any(part(name) for part in parts)}
    filled |= _tie(source, model, wanted, filled)
    missing = {name for name in wanted - filled if not loader.may_be_missing(name)}
    if missing:
        raise UserError(_lacks(source, missing))


def _check_left_over(source: ModelSource, loader: Loader, target_of: Mapping[str, str]) -> frozenset[str]:
    used = {key for key, target in target_of.items() if target in loader.expected_names}
    unused = {key: target for key, target in target_of.items() if key not in used}
    unused = {key: target for key, target in unused.items() if not loader.may_be_left_over(target)}
    return check_nothing_left_over(source.name, {*unused, *unused.values()}, loader.expected_names | used)


class _Weight:
    """A tensor of a checkpoint that is looked at when it is read: one without numbers would make every answer noise."""

    def __init__(self, model: str, key: str, tensor: LazyTensor) -> None:
        self._model, self._key, self._tensor = model, key, tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._tensor[index]
        if not tensor.is_floating_point():
            raise refuse_dtype(self._model, self._key, str(tensor.dtype).removeprefix("torch."))
        # The sum takes a fraction of the time that reading takes; it may overflow, then the extremes decide.
        if not torch.isfinite(tensor.sum()) and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise UserError(
                f"The tensor {self._key} of {self._model} holds values that are no finite numbers (NaN or infinite). "
                "Download the model again, or choose another."
            )
        return tensor


def _tie(source: ModelSource, model: PreTrainedModel, wanted: Set[str], filled: Set[str]) -> set[str]:
    """Make the head and the embeddings one tensor if they are one; returns the names that this filled.

    Where the checkpoint and the configuration disagree, the checkpoint is believed, as transformers' from_pretrained() does.
    """
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {}) or _headless(source, model, wanted, filled)
    tied: set[str] = set()
    for head, embeddings in pairs.items():
        if not {head, embeddings} <= wanted:
            continue
        name, origin = (head, embeddings) if embeddings in filled else (embeddings, head)
        if origin not in filled:
            continue
        kept = model.get_parameter(origin)
        if name in filled and not torch.equal(kept, model.get_parameter(name)):
            logger.warning(
                "The config.json of %s says that %s and %s are one, but its weights differ: both are kept",
                source.name,
                head,
                embeddings,
            )
            _say_tied(model, False)
            continue
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, kept)
        tied.add(name)
    return tied


def _headless(source: ModelSource, model: PreTrainedModel, wanted: Set[str], filled: Set[str]) -> dict[str, str]:
    """The head and the embeddings, if the checkpoint has no head though its configuration says that it has one of its own."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    layers = (model.get_output_embeddings(), model.get_input_embeddings())
    head, embeddings = (names.get(id(getattr(layer, "weight", None)), "") for layer in layers)
    if head not in wanted - filled or embeddings not in filled:
        return {}
    if model.get_parameter(head).shape != model.get_parameter(embeddings).shape:
        return {}
    logger.warning(
        "%s lacks %s: its embeddings are taken for it, though its config.json does not say so", source.name, head
    )
    _say_tied(model, True)
    return {head: embeddings}


def _say_tied(model: PreTrainedModel, tied: bool) -> None:
    """For whoever ties the model's weights by its configuration from now on."""
    for config in (model.config, text_config(model.config)):
        config.tie_word_embeddings = tied


def _lacks(source: ModelSource, missing: Iterable[str]) -> str:
    names = sorted(missing)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"The checkpoint of {source.name} lacks the tensor {names[0]}{others}. "
        "Download the model again, with all of its files, or choose another."
    )
