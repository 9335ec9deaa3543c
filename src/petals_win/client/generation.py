"""Petals' documented generate(): transformers' own one, inside a session that goes on from call to call.

Knows what generate() takes and what a session has said. Does not know how the model computes, nor petals, which imports this.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager
from typing import Any

import torch

from petals_win.client.blocking import InferenceSession
from petals_win.client.hollow import RemoteCache

logger = logging.getLogger(__name__)
_Model: Any = object  # the transformers class that comes after it


class RemoteGenerationMixin(_Model):
    """`generate()` inside an inference session: servers keep the KV caches of the tokens that were sent before.

    The class that mixes it in has `blocks`, petals' RemoteSequential, `config`, and transformers' GenerationMixin after it.
    """

    blocks: Any

    @property
    def active_session(self) -> InferenceSession | None:
        return self.blocks.active_session

    def use_session(self, session: InferenceSession | None) -> AbstractContextManager[InferenceSession]:
        """A context in which forward() and generate() use this open session."""
        return self.blocks.use_session(session)

    def inference_session(self, *, max_length: int) -> AbstractContextManager[InferenceSession]:
        """A context with a new session of at most `max_length` tokens, for which servers reserve cache."""
        return self.blocks.inference_session(max_length=max_length)

    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any
    ) -> Any:
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
            result: Any = super().generate(inputs, *args, **kwargs)
            sequences: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
            session.output_ids = sequences
            new = sequences[:, 0 if said is None else said.shape[1] :].clone()
            if isinstance(result, torch.Tensor):
                return new
            result.sequences = new
            return result

    def _session_for(
        self, inputs: torch.Tensor | None, session: InferenceSession | None, kwargs: dict[str, Any]
    ) -> AbstractContextManager[InferenceSession]:
        if session is not None:
            return self.use_session(session)
        if self.active_session is not None:
            return contextlib.nullcontext(self.active_session)
        length, new = kwargs.get("max_length"), kwargs.get("max_new_tokens")
        if length is None and new is not None:
            length = new + (inputs.shape[1] if inputs is not None else 0)
        elif length is None or new is not None:
            raise ValueError(
                "Give either max_length or max_new_tokens, so that servers know how much cache to reserve"
            )
        return self.inference_session(max_length=self.config.pre_seq_len + length)


def _mask_for(inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A mask of the shape of `inputs`; a given one may cover only their last tokens."""
    missing = inputs.shape[1] - (0 if mask is None else mask.shape[1])
    ones = torch.ones(len(inputs), missing, dtype=torch.int64)
    return ones if mask is None else torch.cat([ones.to(mask.dtype), mask], dim=1)
