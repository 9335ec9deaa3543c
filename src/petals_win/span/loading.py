"""From a checkpoint into a model on the meta device: only the tensors asked for.

Knows checkpoints and the loader of transformers. Does not know spans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals_win.errors import UserError
from petals_win.span.architecture import empty_model
from petals_win.span.transformers_internals import LazyTensor, Loader

if TYPE_CHECKING:
    from petals_win.span.source import ModelSource


def model_to_fill(source: ModelSource, dtype: torch.dtype, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The whole model on the meta device, ready to generate as soon as it has its weights."""
    model = empty_model(source.config, dtype, auto_class)
    if model.can_generate():
        model.generation_config = source.generation_config() or model.generation_config
    return model


def load_whole_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all of its weights, on the CPU."""
    model = model_to_fill(source, dtype)
    load_parts(source, model, [lambda _name: True], dtype=dtype, device=torch.device("cpu"))
    model.tie_weights()
    return model.requires_grad_(False)


def load_parts(
    source: ModelSource,
    model: PreTrainedModel,
    parts: Sequence[Callable[[str], bool]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill those parameters of `model` whose names one of `parts` accepts, part after part, each tensor by itself. All are frozen.

    `progress` gets the number of parts done and of all parts. Raises UserError if the checkpoint lacks tensors or has some
    of another shape.
    """
    loader = Loader(model, dtype)
    tensors = source.checkpoint.tensors(model)
    target_of = {key: loader.target(key) for key in tensors}
    keys_of_parts = [[key for key, target in target_of.items() if part(target)] for part in parts]
    source.checkpoint.fetch(key for keys in keys_of_parts for key in keys)
    filled: set[str] = set()
    for done, keys in enumerate(keys_of_parts, start=1):
        selected: dict[str, LazyTensor] = {key: tensors[key] for key in keys}
        try:
            filled |= loader.load(selected, device)
        except ValueError as e:
            raise UserError(
                f"The weights of {source.name} do not fit its config.json: {e}. Download the model again, or choose another."
            ) from e
        model.requires_grad_(False)  # the new parameters are trainable, whatever those in whose place they are were
        if progress is not None:
            progress(done, len(parts))
    wanted = {name for name in loader.expected_names if any(part(name) for part in parts)}
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = {name for name in wanted - filled if not loader.may_be_missing(name) and tied.get(name) not in filled}
    if missing:
        raise UserError(_lacks(source, missing))


def _lacks(source: ModelSource, missing: Iterable[str]) -> str:
    names = sorted(missing)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"The checkpoint of {source.name} lacks the tensor {names[0]}{others}. "
        "Download the model again, with all of its files, or choose another."
    )
