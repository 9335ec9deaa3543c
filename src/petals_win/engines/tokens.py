"""What computes tokens, below all text: the protocol between the text half of an engine and whatever continues token ids.

Knows token ids and the tokenizer that belongs to them. Does not know templates, stop strings or how a token is computed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel

from petals_win.engines.base import GenerationRequest, ModelCard, SwarmStatus
from petals_win.engines.sampling import check_settings
from petals_win.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Language:
    """What the token ids of a model mean: its tokens are 0 to `vocabulary` - 1, and each of `ends` ends an answer."""

    tokenizer: Any
    vocabulary: int
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, model: PreTrainedModel) -> Language:
        """That of a model, or of a client's half of it, by its configuration.

        Raises UserError for a generation_config that cannot be followed, and a tokenizer that is not the model's.
        """
        config: Any = model.config
        vocabulary = config.get_text_config(decoder=True).vocab_size
        ends = end_tokens(model.generation_config)
        if beyond := [end for end in ends if not 0 <= end < vocabulary]:
            logger.warning("%s is to end an answer, but the model has the tokens 0 to %d", beyond[0], vocabulary - 1)
        check_settings(model)
        return cls(tokenizer, vocabulary, ends)


def end_tokens(config: Any) -> frozenset[int]:
    """The tokens that end an answer by transformers' GenerationConfig, which has none, one or a list of them.

    Raises UserError for something else in their place.
    """
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if strange := [end for end in ends if type(end) is not int]:
        raise UserError(
            f"The model's generation_config.json says that {strange[0]!r} ends an answer, which is no token. "
            "Correct what it says, or delete that file."
        )
    return frozenset(ends)


def nobody_counts(_cached: int) -> None:
    """For whoever does not want to know how many tokens of a prompt were not computed."""


class TokenEngine(Protocol):
    """Continues the token ids of one model. All methods are called on one event loop, and `generate` several times at once.

    `petals_win.engines.text.TextEngine` makes an Engine of it, and has checked a request before it gets here.
    """

    @property
    def language(self) -> Language:
        """The same for as long as the engine lives."""
        ...

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """As Engine.start."""
        ...

    def card(self) -> ModelCard:
        """The model, and the longest prompt plus answer that is possible now. Answers from memory, without waiting."""
        ...

    def status(self) -> SwarmStatus:
        """As Engine.status."""
        ...

    def generate(
        self, prompt: list[int], request: GenerationRequest, limit: int, cached: Callable[[int], None] = nobody_counts
    ) -> AsyncGenerator[int, None]:
        """Yield the tokens that continue `prompt`: at most `limit` (at least 1), the last of them an end token if one comes.

        The prompt is not empty, its tokens are the model's, and it fits into the context with `limit` more. Of the request
        only what chooses tokens is of interest: temperature and its like, min_tokens, ignore_eos, seed, logprobs, by which
        each token is a `petals_win.client.choosing.WeighedToken`.
        `cached` is told with the first token how many of the prompt's were not computed.
        Whoever consumes it may stop at any point, and errors are raised, as Engine.generate says. When `close` is called
        meanwhile it ends soon, in whatever way.
        """
        ...

    async def embed(self, tokens: list[int]) -> list[float]:
        """As Engine.embed, for at least one token and no more than the context has; an engine that cannot raises UserError."""
        ...

    async def close(self) -> None:
        """As Engine.close."""
        ...
