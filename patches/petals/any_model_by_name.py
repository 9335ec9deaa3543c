"""Open any Hugging Face decoder by name, folder or GGUF file: no table of architectures.

Why: the auto classes know three model families through classes written for transformers 4.32 ("ValueError: Petals does not
    support model type qwen3") and pass arguments that transformers 5 removed (use_auth_token).
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; it goes with blocks_by_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.utils.auto_config", digest="2c6ff128d6c47105")

import dataclasses
import os
from typing import Optional, Union

from hivemind import DHT
from transformers import PretrainedConfig, PreTrainedModel

from petals.client.config import ClientConfig
from petals.client.ptune import PTuneConfig
from petals_win.models.architecture import counted_in_blocks, queries_of_a_key, text_config
from petals_win.models.source import ModelSource, open_model

_OWN_FIELDS = {field.name: field for kind in (ClientConfig, PTuneConfig) for field in dataclasses.fields(kind)}


def _own_defaults() -> dict:
    return {**dataclasses.asdict(ClientConfig()), **dataclasses.asdict(PTuneConfig())}


class AutoDistributedConfig:
    """The config of a model's decoder, extended by the fields of ClientConfig and PTuneConfig."""

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: Union[str, os.PathLike],
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
        use_auth_token: Optional[Union[str, bool]] = None,
        cache_dir: Optional[str] = None,
        **own_fields,
    ) -> PretrainedConfig:
        """The model's config with `own_fields`, any field of ClientConfig or PTuneConfig; others are a TypeError."""
        token = token if token is not None else use_auth_token
        source = open_model(str(model_name_or_path), revision=revision, token=token, cache_dir=cache_dir)
        return cls.of(source, **own_fields)

    @staticmethod
    def of(source: ModelSource, **own_fields) -> PretrainedConfig:
        """As from_pretrained, for a model that is open already."""
        unknown = own_fields.keys() - _OWN_FIELDS.keys()
        if unknown:
            raise TypeError(
                f"Unknown setting {', '.join(sorted(unknown))}: known are {', '.join(sorted(_OWN_FIELDS))}"
            )
        config = counted_in_blocks(text_config(source.config))
        if own_fields.get("dht_prefix") is None:
            own_fields["dht_prefix"] = source.dht_prefix
        for name, value in {**_own_defaults(), **own_fields}.items():
            setattr(config, name, value)
        config.num_key_value_groups = queries_of_a_key(config)
        return config


class _AutoDistributedBase:
    _task: str

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: Union[str, os.PathLike],
        *,
        dht: Optional[DHT] = None,
        torch_dtype=None,
        dtype=None,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
        use_auth_token: Optional[Union[str, bool]] = None,
        cache_dir: Optional[str] = None,
        **own_fields,
    ) -> PreTrainedModel:
        """A transformers model whose blocks are served by the swarm; the rest of its weights is loaded here.

        :param dht: a running DHT to use; otherwise one is started from `initial_peers`
        :param dtype: of the weights loaded here (torch_dtype is its older name); default: the checkpoint's own
        :param own_fields: any field of ClientConfig or PTuneConfig, e.g. initial_peers, tuning_mode, active_adapter
        """
        from petals.models import distribute

        token = token if token is not None else use_auth_token
        source = open_model(str(model_name_or_path), revision=revision, token=token, cache_dir=cache_dir)
        if own_fields.get("dht_prefix") is None:
            own_fields["dht_prefix"] = source.swarm_name
        config = AutoDistributedConfig.of(source, **own_fields)
        return distribute(source, config, dht=dht, dtype=dtype if dtype is not None else torch_dtype, task=cls._task)


class AutoDistributedModel(_AutoDistributedBase):
    _task = "base"


class AutoDistributedModelForCausalLM(_AutoDistributedBase):
    _task = "causal_lm"


class AutoDistributedModelForSequenceClassification(_AutoDistributedBase):
    _task = "sequence_classification"
