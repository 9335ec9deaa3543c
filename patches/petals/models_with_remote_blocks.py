"""Make the client's model from transformers' own class, with the swarm in the place of its layers.

Why: each architecture had a copy of its model's forward() for transformers 4.32 to 4.34, which no longer matches ("ImportError:
    cannot import name 'LLAMA_INPUTS_DOCSTRING'", removed cache classes); one mixin over any class needs no copy.
Status: superseded-by petals_win.client.remote_model
Upstream-issue: none
Drop-when: never; it goes with blocks_by_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.models", digest="1e65fbf0c18d4134")

from typing import Optional

from hivemind import DHT
from transformers import PretrainedConfig, PreTrainedModel

from petals.client.ptune import PTuneMixin
from petals.client.remote_generation import RemoteGenerationMixin
from petals.client.remote_sequential import RemoteSequential
from petals_win.client.remote_model import RemoteModelMixin, remote_model
from petals_win.models.source import ModelSource


class DistributedModelMixin(RemoteModelMixin, PTuneMixin, RemoteGenerationMixin):
    """What a transformers model gains when its blocks are remote: sessions, prompt tuning, generation on the swarm."""


def distribute(
    source: ModelSource, config: PretrainedConfig, *, dht: Optional[DHT] = None, dtype=None, task: str = "causal_lm"
) -> PreTrainedModel:
    """The model of `source` with its blocks in the swarm that `config` (AutoDistributedConfig) or `dht` names.

    :param task: "base", "causal_lm" or "sequence_classification", as in petals_win.client.hollow
    """
    sequential = RemoteSequential(config, dht=dht)
    return remote_model(source, config, sequential, DistributedModelMixin, dtype=dtype, task=task)
