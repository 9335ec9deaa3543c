"""Make the client's model from transformers' own class, with the swarm in the place of its layers.

Why: each architecture had a copy of its model's forward() for transformers 4.32 to 4.34, which no longer matches ("ImportError:
    cannot import name 'LLAMA_INPUTS_DOCSTRING'", removed cache classes); one mixin over any class needs no copy.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; it goes with blocks_by_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.models", digest="1e65fbf0c18d4134")

from contextvars import ContextVar
from typing import Optional

import torch
from hivemind import DHT
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.client.ptune import PTuneMixin
from petals.client.remote_generation import RemoteGenerationMixin
from petals.client.remote_sequential import RemoteSequential
from petals.utils.misc import is_dummy
from petals_win.client.hollow import RemoteCache, hollow_model
from petals_win.models.source import ModelSource

_deep_prompts: ContextVar[Optional[torch.Tensor]] = ContextVar("deep_prompts", default=None)
_cache: ContextVar[Optional[RemoteCache]] = ContextVar("cache", default=None)


class RemoteBlocks(nn.Module):
    """What stands in the place of a model's layers: hidden states [batch, tokens, hidden] through the swarm."""

    def __init__(self, sequential: RemoteSequential):
        super().__init__()
        self.sequential = sequential

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        prompts, cache = _deep_prompts.get(), _cache.get()
        if self.sequential.active_session is None:
            return self.sequential(hidden_states, prompts)
        hypo_ids = cache.take_hypo_ids() if cache is not None else None
        return self.sequential(hidden_states, prompts, hypo_ids=hypo_ids)


class DistributedModelMixin(PTuneMixin, RemoteGenerationMixin):
    """What a transformers model gains when its blocks are remote: sessions, prompt tuning, generation on the swarm."""

    @property
    def blocks(self) -> RemoteSequential:
        """The remote blocks, as documented for `model.transformer.h` and `model.model.layers` of upstream."""
        return self.remote_blocks[0].sequential

    @property
    def word_embeddings(self) -> nn.Module:
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        *,
        attention_mask: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        cache: Optional[RemoteCache] = None,
        labels: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        **kwargs,
    ):
        """As the transformers class, with the prompts of prompt tuning before the first token of a sequence."""
        prefix_length, deep_prompts = 0, None
        if self.config.tuning_mode is not None and self.blocks.position == 0:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.word_embeddings(input_ids), None
            prompts, deep_prompts = self.get_prompt(len(inputs_embeds))
            prefix_length = prompts.shape[1]
            inputs_embeds = torch.cat([prompts.to(inputs_embeds.dtype), inputs_embeds], dim=1)
            # It covers the tokens only; here it says nothing that the shapes do not (hollow_model refuses padding).
            attention_mask = None
            kwargs.pop("position_ids", None)
            if deep_prompts is not None and is_dummy(deep_prompts):
                deep_prompts = None
        if attention_mask is not None:  # which generate() looks for among the parameters' names
            kwargs["attention_mask"] = attention_mask
        if self.blocks.active_session is not None:
            cache = (
                RemoteCache(lambda: self.blocks.position) if cache is None else cache.at(lambda: self.blocks.position)
            )
            kwargs["cache"] = cache
        tokens = [_deep_prompts.set(deep_prompts), _cache.set(cache)]
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
                logits=outputs["logits"], labels=labels, pooled_logits=outputs["logits"], config=self.config,
                vocab_size=self.config.vocab_size,
            )  # fmt: skip
        return outputs


def distribute(
    source: ModelSource, config: PretrainedConfig, *, dht: Optional[DHT] = None, dtype=None, task: str = "causal_lm"
) -> PreTrainedModel:
    """The model of `source` with its blocks in the swarm that `config` (AutoDistributedConfig) or `dht` names.

    :param task: "base", "causal_lm" or "sequence_classification", as in petals_win.client.hollow
    """
    sequential = RemoteSequential(config, dht=dht)
    blocks = RemoteBlocks(sequential)
    model = hollow_model(source, blocks, dtype=dtype, task=task)
    # The instance keeps its class's code and gains the mixin's: no subclass has to exist for each architecture.
    model.__class__ = type(f"Distributed{type(model).__name__}", (DistributedModelMixin, type(model)), {})
    model.remote_blocks = (blocks,)  # in a tuple, so that it is registered as a submodule only once
    for name in ("tuning_mode", "pre_seq_len", "dht_prefix", "initial_peers", "active_adapter"):
        setattr(model.config, name, getattr(config, name))
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not hasattr(model.config, name):  # it is of more than text: the decoder has a part of it to itself
            setattr(model.config, name, getattr(config, name))
    model.init_prompts(model.config)
    return model
