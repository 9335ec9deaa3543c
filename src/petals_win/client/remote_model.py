"""A transformers model whose blocks are elsewhere: what its forward() takes with it to them, and how such a model is made.

Knows prompt tuning and sessions as a model meets them. Does not know routes, nor petals, which imports this and gives it the blocks.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals_win.client.hollow import RemoteCache, hollow_model, takes_no_embeddings
from petals_win.errors import UserError
from petals_win.models.architecture import text_config
from petals_win.models.rows import Row
from petals_win.models.source import ModelSource

_deep_prompts: ContextVar[torch.Tensor | None] = ContextVar("deep_prompts", default=None)
_cache: ContextVar[RemoteCache | None] = ContextVar("cache", default=None)
_Model: Any = object  # the transformers class that comes after it

_SETTINGS = ("tuning_mode", "pre_seq_len", "dht_prefix", "initial_peers", "active_adapter")
_SHAPES = ("hidden_size", "num_hidden_layers", "vocab_size")


class RemoteBlocks(nn.Module):
    """What stands in the place of a model's layers: hidden states [batch, tokens, hidden] through the swarm."""

    def __init__(self, sequential: nn.Module) -> None:
        """`sequential` is petals' RemoteSequential."""
        super().__init__()
        self.sequential: Any = sequential

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        prompts, cache = _deep_prompts.get(), _cache.get()
        if self.sequential.active_session is None:
            return self.sequential(hidden_states, prompts)
        hypo_ids = cache.take_hypo_ids() if cache is not None else None
        return self.sequential(hidden_states, prompts, hypo_ids=hypo_ids)


class RemoteModelMixin(_Model):
    """forward() of a model whose blocks are remote. `get_prompt(batch)` comes from what is mixed in with it."""

    @property
    def blocks(self) -> Any:
        """The remote blocks, as documented for `model.transformer.h` and `model.model.layers` of upstream."""
        return self.remote_blocks[0].sequential

    @property
    def word_embeddings(self) -> nn.Module:
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: RemoteCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the transformers class, with the prompts of prompt tuning before the first token of a sequence."""
        prefix_length, deep_prompts = 0, None
        if self.config.tuning_mode is not None and self.blocks.position == 0:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.word_embeddings(input_ids), None
            assert inputs_embeds is not None
            prompts, deep_prompts = self.get_prompt(len(inputs_embeds))
            prefix_length = prompts.shape[1]
            inputs_embeds = torch.cat([prompts.to(inputs_embeds.dtype), inputs_embeds], dim=1)
            # It covers the tokens only; here it says nothing that the shapes do not (hollow_model refuses padding).
            attention_mask = None
            kwargs.pop("position_ids", None)
            if deep_prompts.numel() == 0:  # the prompts are before the first block only
                deep_prompts = None
        if attention_mask is not None:  # which generate() looks for among the parameters' names
            kwargs["attention_mask"] = attention_mask
        if self.blocks.active_session is not None:
            cache = (
                RemoteCache(lambda: self.blocks.position) if cache is None else cache.at(lambda: self.blocks.position)
            )
            kwargs["cache"] = cache
        tokens = _deep_prompts.set(deep_prompts), _cache.set(cache)
        try:
            outputs = super().forward(
                input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=cache is not None, **kwargs
            )
        finally:
            _cache.reset(tokens[1])
            _deep_prompts.reset(tokens[0])
        if prefix_length:
            name = "logits" if "logits" in outputs else "last_hidden_state"
            if outputs[name].ndim == 3 and outputs[name].shape[1] > prefix_length:
                outputs[name] = outputs[name][:, prefix_length:]
        if labels is not None:
            outputs["loss"] = self.loss_function(
                logits=outputs["logits"],
                labels=labels,
                pooled_logits=outputs["logits"],
                config=self.config,
                vocab_size=self.config.vocab_size,
            )
        return outputs


def remote_model(
    source: ModelSource,
    config: PretrainedConfig,
    sequential: nn.Module,
    mixin: type,
    *,
    dtype: torch.dtype | None,
    task: str,
) -> PreTrainedModel:
    """The model of `source` with `sequential`, petals' RemoteSequential, for its blocks, and what `mixin` gives it.

    `mixin` has RemoteModelMixin among its bases. Of `config` come the settings of prompt tuning and the swarm. `task` is as
    in petals_win.client.hollow. Raises UserError for prompt tuning of a model that cannot have it.
    """
    decoder_config = text_config(source.config)
    if config.tuning_mode is not None and Row.of(decoder_config).own:
        raise UserError(takes_no_embeddings(decoder_config.model_type))
    blocks = RemoteBlocks(sequential)
    model: Any = hollow_model(source, blocks, dtype=dtype, task=task)
    # The instance keeps its class's code and gains the mixin's: no subclass has to exist for each architecture.
    model.__class__ = type(f"Distributed{type(model).__name__}", (mixin, type(model)), {})
    model.remote_blocks = (blocks,)  # in a tuple, so that it is registered as a submodule only once
    for name in _SETTINGS:
        setattr(model.config, name, getattr(config, name))
    for name in _SHAPES:
        if not hasattr(model.config, name):  # it is of more than text: the decoder has a part of it to itself
            setattr(model.config, name, getattr(config, name))
    model.init_prompts(model.config)
    return model
