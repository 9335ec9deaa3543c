"""Both ends of a model, for many answers at once: token ids to hidden states, and hidden states to logits.

Knows hollow models and how they take positions. Does not know what happens in between, nor how a token is chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_win.client.hollow import RemoteCache, remote_layer
from petals_win.models.architecture import decoder_of

logger = logging.getLogger(__name__)

_TRIED_TOKENS = 9  # of a sequence by which the ways to embed are compared
_TOLERANCE = 1e-5  # of the largest value; more where a number has fewer digits than this


class Ends:
    """The embedding and the head of a hollow model, whose remote layer is taken over by this object.

    Transformers' own forward() runs for both, so scales, learned positions, norms and soft-capping are the model's; or only those
    of its modules that do something, if they alone compute the same. All methods are called in one thread at a time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Computes with a few tokens, to find out by numbers how tokens at different positions can share a pass."""
        self._model, self._decoder = model, decoder_of(model)
        self._between = _Between()
        remote_layer(model).remote = self._between
        self.batched = True  # whether all rows share a pass through the embedding
        self._embed = self._way_to_embed()
        self._logits = self._way_to_logits()

    @torch.inference_mode()
    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the first block gets, [tokens, hidden], for token ids at their positions (int64, [tokens] each)."""
        return self._embed(ids, positions)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] (float32) from what the last block returned for one token each, [rows, hidden]."""
        return self._logits(hidden.to(self._model.dtype))

    @torch.inference_mode()
    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head gets, [rows, hidden] (float32), from what the last block returned for one token each, [rows, hidden]."""
        self._between.given = hidden.to(self._model.dtype)[:, None]
        try:
            unused = torch.zeros(len(hidden), 1, dtype=torch.int64)
            return self._decoder(input_ids=unused, use_cache=False).last_hidden_state[:, -1].float()
        finally:
            self._between.given = None

    def _way_to_embed(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        embedding: Any = self._model.get_input_embeddings()
        count = embedding.weight.shape[0]
        ids = torch.arange(1, _TRIED_TOKENS + 1) * (count - 1) // (_TRIED_TOKENS + 1)
        positions = torch.arange(_TRIED_TOKENS)
        with torch.inference_mode():
            self._model(input_ids=ids[None], use_cache=False)
            right = self._between.taken()[0]
            for way in (self._by_the_embedding, self._at_given_positions, self._at_any_position):
                try:
                    found = way(ids, positions)
                except TypeError:  # the decoder takes no positions, or the embedding more than ids
                    continue
                if _same(found, right, right.dtype):
                    return way
        logger.info("The embedding of %s does not take positions: answers are embedded one by one", type(self._model))
        self.batched = False
        return self._in_sequences

    def _way_to_logits(self) -> Callable[[torch.Tensor], torch.Tensor]:
        head: Any = self._model.get_output_embeddings()
        behind: list[nn.Module] = []  # the blocks, in the order of their calls
        hooks = [remote_layer(self._model).register_forward_hook(lambda *_: behind.clear())]
        hooks += [
            child.register_forward_hook(lambda child, *_: behind.append(child)) for child in self._decoder.children()
        ]
        row = remote_layer(self._model).row
        hidden = torch.randn(_TRIED_TOKENS, row.width, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(self._model.dtype)
        with torch.inference_mode():
            try:
                right = self._by_the_model(hidden)
            finally:
                for hook in hooks:
                    hook.remove()

            def by_modules(rows: torch.Tensor) -> torch.Tensor:
                hidden = row.hidden_of(rows[:, None])[..., 0, :]
                for module in behind:
                    hidden = module(hidden)
                return head(hidden).float()

            try:
                found = by_modules(hidden)
            except Exception as e:  # whatever modules raise that are called in another way than by their model
                logger.debug("The modules behind the blocks cannot be called alone: %s", e)
                return self._by_the_model
        return by_modules if _same(found, right, self._model.dtype) else self._by_the_model

    def _by_the_model(self, hidden: torch.Tensor) -> torch.Tensor:
        self._between.given = hidden[:, None]
        try:
            # The tokens are embedded in vain, which is cheap, and every model takes them.
            unused = torch.zeros(len(hidden), 1, dtype=torch.int64)
            return self._model(input_ids=unused, use_cache=False).logits[:, -1].float()
        finally:
            self._between.given = None

    def _by_the_embedding(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedding: Any = self._model.get_input_embeddings()
        return embedding(ids)

    def _at_given_positions(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._decoder(input_ids=ids[:, None], position_ids=positions[:, None], use_cache=False)
        return self._between.taken()[:, 0]

    def _at_any_position(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._decoder(input_ids=ids[:, None], use_cache=False)
        return self._between.taken()[:, 0]

    def _in_sequences(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Each run of tokens that follow one another in a pass of its own, as behind a cache of what was before."""
        starts = [0, *(torch.nonzero(positions.diff() != 1).flatten() + 1).tolist(), len(ids)]
        runs = []
        for start, end in zip(starts, starts[1:], strict=False):
            before = int(positions[start])
            self._decoder(input_ids=ids[None, start:end], cache=RemoteCache(lambda n=before: n), use_cache=True)
            runs.append(self._between.taken()[0])
        return torch.cat(runs)


def _same(found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the two, computed in `dtype`, differ by rounding alone."""
    limit = right.abs().max() * max(_TOLERANCE, 2 * torch.finfo(dtype).eps)
    return found.shape == right.shape and bool((found - right).abs().max() <= limit)


class _Between(nn.Module):
    """In the place of all layers: keeps what comes in, and gives back what it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self.given: torch.Tensor | None = None
        self._came: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.given is not None:
            return self.given
        self._came = hidden
        return hidden

    def taken(self) -> torch.Tensor:
        """What came in last, [batch, tokens, hidden]; once."""
        came, self._came = self._came, None
        assert came is not None
        return came
