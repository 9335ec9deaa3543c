"""How one answer's next token is chosen from logits: transformers' logits processors, then the most likely token or a drawn one.

Knows what generate() of transformers would apply. Does not know requests, sessions or other answers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    TopPLogitsWarper,
)

from petals_win.client.hollow import RemoteCache

_LIKELIEST = 1024  # tokens, in whose order top-p is tried first
_NEVER = float("-inf")


class Guide(Protocol):
    """Which tokens one answer may go on with. Used by one thread, in turn: what is forbidden, what was taken."""

    def forbidden(self) -> torch.Tensor | None:
        """The tokens that may not come next, as bool [vocabulary], of which at least one may; None if all may.

        Waits until it is known. Raises UserError if the answer cannot go on.
        """
        ...

    def took(self, token: int) -> None:
        """The next token is this one. Does not wait: what may follow it is found out beside the step through the blocks."""
        ...


class WeighedToken(int):
    """A token id that says how likely the token was, and which ones were the likeliest; the likeliest comes first.

    logprob, and the second of each pair: natural logarithms of probabilities by the logits as they came from the model.
    """

    logprob: float
    likeliest: tuple[tuple[int, float], ...]

    def __new__(cls, token: int, logprob: float, likeliest: tuple[tuple[int, float], ...]) -> WeighedToken:
        weighed = super().__new__(cls, token)
        weighed.logprob, weighed.likeliest = logprob, likeliest
        return weighed


class Sampler:
    """Chooses the tokens of one answer; used for one answer only, since processors, the generator and the guide have a state."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        generator: torch.Generator | None = None,
        *,
        logprobs: int | None = None,
        guide: Guide | None = None,
    ) -> None:
        """`generator` draws the token; without one the most likely is taken. `logprobs`: how many of the likeliest are told.

        `guide` leaves some of them out.
        """
        self._processors = processors
        self._generator = generator
        self._logprobs = logprobs
        self._guide = guide

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether it chooses the largest logit as it stands, so that one look at a whole batch will do."""
        return not self._processors and self._generator is None and self._guide is None

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token after `ids` [1, prompt and answer so far], by its logits [1, vocabulary], float32.

        Raises what the guide does.
        """
        forbidden = self._guide.forbidden() if self._guide is not None else None
        # Before the processors, some of which keep the likeliest tokens only.
        allowed = logits if forbidden is None else logits.masked_fill(forbidden, _NEVER)
        scores = self._processors(ids, allowed)  # pyright: ignore[reportArgumentType]
        if forbidden is not None and self._processors:
            scores = scores.masked_fill(forbidden, _NEVER)  # some processors force a token
            if scores.max() == _NEVER:
                scores = allowed  # and a model's own settings may forbid all that its answer can go on with
        token = self._draw(scores) if forbidden is None else self._draw_of_few(scores)
        if self._guide is not None:
            self._guide.took(token)
        return token

    def _draw_of_few(self, scores: torch.Tensor) -> int:
        """As `_draw`; a random number for each token of a vocabulary takes as long as all the rest, and most are left out here."""
        kept = (scores[0] != _NEVER).nonzero()[:, 0]
        return int(kept[self._draw(scores[:, kept])])

    def _draw(self, scores: torch.Tensor) -> int:
        if self._generator is None:
            return int(scores.argmax(dim=-1))
        # A generator of the answer's own: with one for all, a seed would give what others left over.
        return drawn(scores[0].softmax(dim=-1), self._generator)

    def weighed(self, token: int, logits: torch.Tensor) -> int:
        """The token that was chosen by the logits [1, vocabulary]: a WeighedToken, if log probabilities are told."""
        if self._logprobs is None:
            return token
        logprobs = logits[0].log_softmax(dim=-1)
        best = logprobs.topk(min(self._logprobs, len(logprobs)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return WeighedToken(token, float(logprobs[token]), likeliest)


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """One of the tokens, by their probabilities [vocabulary].

    With one random number, where torch.multinomial takes one for each token: 0.06 ms instead of 0.8 for 49,152 of them.
    """
    reached = probabilities.cumsum(dim=-1, dtype=torch.float64)
    number = reached[-1] * torch.rand((), dtype=torch.float64, generator=generator)
    return int(torch.searchsorted(reached[:-1], number, right=True))


def processors_of_generate(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> LogitsProcessorList:
    """The logits processors that `model.generate(ids, **arguments)` would apply, in its order; nothing is computed.

    `ids` is the prompt [1, tokens]. What `arguments` leave open is as the model's generation_config says.
    """
    generate: Any = model.generate
    processors = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=RemoteCache(lambda: 0),
        custom_generate=lambda _model, _ids, logits_processor, **_: logits_processor,
        **arguments,
    )
    return LogitsProcessorList([_faster(each) for each in processors])


def _faster(processor: Any) -> Any:
    """A processor that does the same with less work for a large vocabulary, where there is one."""
    kind = type(processor)
    if kind is TopPLogitsWarper:
        return _TopP(processor)
    if kind is MinLengthLogitsProcessor:
        return _NoEnd(processor.eos_token_id, processor.min_length)
    if kind is MinNewTokensLengthLogitsProcessor:
        return _NoEnd(processor.eos_token_id, processor.prompt_length_to_skip + processor.min_new_tokens)
    return processor


class _NoEnd(LogitsProcessor):
    """What transformers' processors for a least length do, which look for the tokens that end an answer among the whole vocabulary."""

    def __init__(self, ends: torch.Tensor, length: int) -> None:
        """`ends`: ids that do not come next before prompt and answer have so many tokens."""
        self._ends, self._length = ends.flatten(), length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` and the result are [1, vocabulary]."""
        if input_ids.shape[-1] >= self._length:
            return scores
        return scores.index_fill(-1, self._ends[self._ends < scores.shape[-1]], _NEVER)


class _TopP(LogitsProcessor):
    """What transformers' TopPLogitsWarper does, which sorts the whole vocabulary: more work than all the rest of choosing.

    As a rule the tokens that are kept are among a few of the likeliest; where they are not, transformers' own one decides.
    """

    def __init__(self, warper: TopPLogitsWarper) -> None:
        self._warper = warper

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` and the result are [1, vocabulary]."""
        best = scores.softmax(dim=-1).topk(min(_LIKELIEST, scores.shape[-1]))
        likelier = best.values.cumsum(dim=-1) - best.values  # the probability of all tokens before each one
        if likelier[0, -1] < self._warper.top_p:
            return self._warper(input_ids, scores)  # pyright: ignore[reportArgumentType]
        kept = best.indices[likelier < self._warper.top_p][None]
        nothing = torch.full_like(scores, self._warper.filter_value)
        return nothing.scatter(-1, kept, scores.gather(-1, kept))
