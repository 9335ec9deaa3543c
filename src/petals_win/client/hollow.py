"""The client's half of a model: embeddings, final norm and head here, all blocks behind one remote module.

Knows how transformers' models and generate() use their layers and their cache. Does not know what the remote module does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from petals_win.client.head import fast_head
from petals_win.host.threads import computing
from petals_win.models.architecture import config_of_blocks, find_blocks, text_config
from petals_win.models.eight_bits import Scaled, scaled_of
from petals_win.models.four_bits import Unread
from petals_win.models.loading import load_parts, model_to_fill
from petals_win.models.rows import Row
from petals_win.models.source import ModelSource
from petals_win.models.transformers_internals import LazyTensor

_TASKS = {
    "base": AutoModel,
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}

# No attention is computed here, so no causal mask is needed; but some models do arithmetic with theirs and cannot do without.
_NO_ATTENTION = "petals_win_remote"

_OWN = "per_layer_input"  # the argument of a block that is for it alone


def _mask_without_memory(batch_size: int, q_length: int, kv_length: int, device: Any = None, **_: Any) -> torch.Tensor:
    """One element in the shape of a mask, [batch, 1, queries, keys]."""
    return torch.ones((), dtype=torch.bool, device=device).expand(batch_size, 1, q_length, kv_length)


AttentionMaskInterface.register(_NO_ATTENTION, _mask_without_memory)


class RemoteCache(Cache):
    """Stands for keys and values that are kept elsewhere: it knows how many tokens they cover, and no tensors.

    It cannot be cropped, so ways of generating that take back tokens (assisted decoding) refuse it.
    """

    is_compileable = False  # pyright: ignore[reportAssignmentType]
    is_croppable = False  # pyright: ignore[reportAssignmentType]

    def __init__(self, position: Callable[[], int]) -> None:
        """`position` returns the number of tokens that the remote session has seen."""
        super().__init__(layers=[])
        self._position = position
        self._hypo_ids: list[torch.Tensor] = []

    def at(self, position: Callable[[], int]) -> RemoteCache:
        """The same cache for a caller that counts positions otherwise; reordering one reorders the other."""
        other = RemoteCache(position)
        other._hypo_ids = self._hypo_ids
        return other

    def take_hypo_ids(self) -> torch.Tensor | None:
        """Which row (int64, [batch]) each row goes on from since the last call; None if nothing was reordered."""
        if not self._hypo_ids:
            return None
        hypo_ids = self._hypo_ids[0]
        for later in self._hypo_ids[1:]:
            hypo_ids = hypo_ids[later]
        self._hypo_ids.clear()
        return hypo_ids

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._hypo_ids.append(beam_idx.to(torch.int64))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._position()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._position() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_linear(self) -> list[bool]:
        # generate() asks whether *all* layers are linear, which an empty list would affirm.
        return [False]


def hollow_model(
    source: ModelSource, remote: nn.Module, *, dtype: torch.dtype | None = None, task: str = "causal_lm"
) -> PreTrainedModel:
    """The transformers model of `source`, frozen, with `remote` in the place of its layers.

    `remote` maps rows (models/rows.py), mostly hidden states, [batch, tokens, width] to the same shape. Only the tensors outside of the layers are read.
    `task` is "causal_lm", "base" (without a head) or "sequence_classification". Called with an attention mask that hides
    tokens, the model raises ValueError.
    """
    dtype = dtype or source.dtype
    model = model_to_fill(source, dtype, _TASKS[task])
    blocks = find_blocks(model)

    def is_local(name: str) -> bool:
        return not name.startswith(blocks.prefix)

    tensors: dict[str, LazyTensor] = {}

    def look_at(name: str, tensor: LazyTensor) -> bool:
        tensors[name] = tensor
        return False

    load_parts(source, model, [is_local], dtype=dtype, device=torch.device("cpu"), take=look_at)
    decoder = blocks.decoder
    row = Row.of(decoder.config)
    takes = list(inspect.signature(type(blocks.layers[0]).forward).parameters)
    if row.own:
        _make_all_own(decoder)
    decoder.config = config_of_blocks(decoder.config, 0, 1)
    for config in (decoder.config, text_config(model.config)):  # a model of more than text makes its masks by its own
        config._attn_implementation = _NO_ATTENTION
    layer = RemoteLayer(remote, row, takes.index(_OWN) - 2 if row.own else -1)
    for name, value in vars(blocks.layers[0]).items():  # some loops look at what kind a layer is
        if isinstance(value, str | int) and not hasattr(layer, name):
            setattr(layer, name, value)
    setattr(decoder, blocks.list_name, nn.ModuleList([layer]))
    layer.wrap = _expected_wrapping(decoder, layer)
    head = model.get_output_embeddings()
    if head is not None:
        stored = _scaled_weight_of(head, model, tensors)
        if (faster := fast_head(head, model.get_input_embeddings(), stored)) is not head:
            head = faster
            model.set_output_embeddings(head)
        head.forward = _with_free_cores(head.forward)
    if model.can_generate():
        model.generation_config.use_cache = (
            True  # whatever the model was saved with: its nodes keep what they have seen
        )
    model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    if row.own:
        model.register_forward_pre_hook(_of_token_ids, with_kwargs=True)
    return model


class RemoteLayer(nn.Module):
    """What the decoder's loop takes for its only layer. `remote` may be replaced."""

    def __init__(self, remote: nn.Module, row: Row, own_at: int) -> None:
        """`own_at`: which of the further arguments is what blocks get for themselves, if they get anything."""
        super().__init__()
        self.remote, self.row = remote, row
        self._own_at = own_at
        self.wrap: Callable[[torch.Tensor], Any] = _plainly

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.row.is_hidden_state:
            own = (kwargs[_OWN] if _OWN in kwargs else args[self._own_at]) if self.row.own else None
            hidden_states = self.row.pack(hidden_states, own)
        return self.wrap(self.row.hidden_of(self.remote(hidden_states)))


def remote_layer(model: PreTrainedModel) -> RemoteLayer:
    """The only layer of a model that `hollow_model` made."""
    return next(module for module in model.modules() if isinstance(module, RemoteLayer))


def _scaled_weight_of(
    layer: nn.Module, model: PreTrainedModel, tensors: Mapping[str, LazyTensor]
) -> Unread[Scaled] | None:
    """A layer's weight as the checkpoint has it, if that is in eight bits, under its own name or as the embeddings that it is."""
    weight = getattr(layer, "weight", None)
    names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is weight]
    found = [tensors[name] for name in names if name in tensors]
    return scaled_of(found[0]) if found else None


def _make_all_own(decoder: Any) -> None:
    """Let the decoder give its only layer what it makes for each of its blocks, [batch, tokens, blocks x own]."""
    whole = copy.copy(decoder)  # which keeps the configuration of all blocks
    decoder.get_per_layer_inputs = whole.get_per_layer_inputs
    decoder.project_per_layer_inputs = lambda *args: whole.project_per_layer_inputs(*args).flatten(2).unsqueeze(2)


def _plainly(output: torch.Tensor) -> torch.Tensor:
    return output


def _alone(output: torch.Tensor) -> tuple[torch.Tensor]:
    return (output,)


def _with_nothing_for_the_next(output: torch.Tensor) -> tuple[torch.Tensor, None]:
    return output, None


def _expected_wrapping(decoder: PreTrainedModel, layer: RemoteLayer) -> Callable[[torch.Tensor], Any]:
    """How the decoder's loop takes the hidden states from its layer: some, as Falcon's and GLM 5's, do it out of a tuple.

    A loop that does would take the first row of a plain tensor instead, so two rows go through and are counted.
    """
    remote, layer.remote = layer.remote, nn.Identity()
    try:
        for layer.wrap in (_plainly, _alone):
            try:
                with torch.no_grad():
                    output = decoder(input_ids=torch.zeros(2, 3, dtype=torch.int64), use_cache=False)
            except ValueError:  # it takes more out of the tuple
                continue
            if output.last_hidden_state.shape[:2] == (2, 3):
                return layer.wrap
        return _with_nothing_for_the_next
    finally:
        layer.remote = remote


def _with_free_cores(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The head is what a client computes; it does so beside the nodes of this PC, and for several answers at once."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        with computing():
            return forward(*args, **kwargs)

    return call


def _of_token_ids(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not args and kwargs.get("input_ids") is None:
        raise ValueError(takes_no_embeddings(model.config.model_type))


def takes_no_embeddings(model_type: str) -> str:
    """What to tell whoever has embeddings for a model whose blocks get inputs that are made of token ids."""
    return (
        f"Blocks of models of the type {model_type} get inputs that are made of the tokens' ids, so that inputs_embeds and prompt tuning "
        "cannot be used with it. Send input_ids, or choose a model of another type, such as Llama or Qwen."
    )


def _without_mask(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if mask is None:
        return args, kwargs
    if mask.ndim != 2 or not mask.bool().all():
        raise ValueError(
            "The attention mask hides tokens, but a swarm sees all tokens of a sequence. Send sequences of one length, "
            "without padding."
        )
    return args, {**kwargs, "attention_mask": None}
