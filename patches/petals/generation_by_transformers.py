"""Generate by transformers' own generate(), with a cache that stands for the session's KV caches on the servers.

Why: the mixin hooks into prepare_inputs_for_generation() and _reorder_cache() as they were in transformers 4.32; transformers 5
    slices inputs by the cache's length and reorders beams through the cache object ("TypeError: generate() got … past_key_values").
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: upstream follows current transformers.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.client.remote_generation", digest="20b067650ecf8f82")

import contextlib
from typing import ContextManager, Optional

import torch
from hivemind.utils.logging import get_logger
from transformers.utils import ModelOutput

from petals.client.inference_session import InferenceSession
from petals.client.remote_sequential import RemoteSequential
from petals_win.client.hollow import RemoteCache

logger = get_logger(__name__)


class RemoteGenerationMixin:
    """`generate()` inside an inference session: servers keep the KV caches of the tokens that were sent before.

    The class that mixes it in has `blocks: RemoteSequential`, `config`, and transformers' GenerationMixin after it.
    """

    blocks: RemoteSequential

    @property
    def active_session(self) -> Optional[InferenceSession]:
        return self.blocks.active_session

    def use_session(self, session: Optional[InferenceSession]) -> ContextManager[InferenceSession]:
        """A context in which forward() and generate() use this open session."""
        return self.blocks.use_session(session)

    def inference_session(self, *, max_length: int) -> ContextManager[InferenceSession]:
        """A context with a new session of at most `max_length` tokens, for which servers reserve cache."""
        return self.blocks.inference_session(max_length=max_length)

    def generate(
        self, inputs: Optional[torch.Tensor] = None, *args, session: Optional[InferenceSession] = None, **kwargs
    ):
        """As transformers' generate(), returning only what is new since the session's last call.

        Without a session one is opened for this call; then exactly one of `max_length` and `max_new_tokens` is needed to
        size it. In a session `inputs` [batch, tokens] are appended to what was said before (None: go on), and need not
        repeat it.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if kwargs.get("max_length", ...) is None:
            del kwargs["max_length"]
        if "do_sample" in kwargs:
            kwargs["do_sample"] = bool(kwargs["do_sample"])  # 0 and 1 are accepted, too
        with self._session_for(inputs, session, kwargs) as session:
            said = session.output_ids
            if said is not None:
                if kwargs.get("num_beams", 1) > 1:
                    logger.warning("Beam search goes on from the best beam only: the others ended with the last call")
                inputs = said if inputs is None else torch.cat([said, inputs], dim=1)
            if inputs is not None:
                # By its length generate() tells that `inputs` begin with what the session has seen already.
                kwargs["attention_mask"] = _mask_for(inputs, kwargs.get("attention_mask"))
            # Tokens of a prompt-tuning prefix are in the servers' caches, but not among the ids that generate() counts.
            prefix = self.config.pre_seq_len
            kwargs["cache"] = RemoteCache(lambda: max(session.position - prefix, 0))
            result = super().generate(inputs, *args, **kwargs)
            sequences = result.sequences if isinstance(result, ModelOutput) else result
            session.output_ids = sequences
            new = sequences[:, 0 if said is None else said.shape[1] :].clone()
            if isinstance(result, ModelOutput):
                result.sequences = new
                return result
            return new

    def _session_for(
        self, inputs: Optional[torch.Tensor], session: Optional[InferenceSession], kwargs: dict
    ) -> ContextManager[InferenceSession]:
        if session is not None:
            return self.use_session(session)
        if self.active_session is not None:
            return contextlib.nullcontext(self.active_session)
        length, new = kwargs.get("max_length"), kwargs.get("max_new_tokens")
        if (length is None) == (new is None):
            raise ValueError(
                "Give either max_length or max_new_tokens, so that servers know how much cache to reserve"
            )
        n_inputs = inputs.shape[1] if inputs is not None else 0
        total = length if length is not None else n_inputs + new
        return self.inference_session(max_length=self.config.pre_seq_len + total)


def _mask_for(inputs: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """A mask of the shape of `inputs`; a given one may cover only their last tokens."""
    missing = inputs.shape[1] - (0 if mask is None else mask.shape[1])
    ones = torch.ones(len(inputs), missing, dtype=torch.int64)
    return ones if mask is None else torch.cat([ones.to(mask.dtype), mask], dim=1)
