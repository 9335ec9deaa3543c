"""The text half of every engine that speaks token ids: from a request to a prompt, from tokens to the events of an answer.

Knows what a request has to fulfil and when an answer ends. Does not know how tokens are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from petals_win.engines.answer import AnswerEvents
from petals_win.engines.base import (
    ContextTooLong,
    EngineClosed,
    Event,
    Finished,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    SwarmStatus,
    Token,
    Usage,
)
from petals_win.engines.chosen import TokenBytes
from petals_win.engines.forced_calls import with_forced_call
from petals_win.engines.prompts import Prompt, PromptEncoder
from petals_win.engines.sampling import check_token_ids
from petals_win.engines.tokens import TokenEngine
from petals_win.errors import UserError


class TextEngine:
    """An Engine, made of a TokenEngine: `tokens`."""

    def __init__(self, tokens: TokenEngine):
        self.tokens = tokens
        self._prompts = PromptEncoder(tokens.card().id, tokens.language.tokenizer, tokens.language.vocabulary)
        self._token_bytes = TokenBytes(tokens.language.tokenizer)
        self._closed = False

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        await self.tokens.start(on_lost)

    def models(self) -> list[ModelCard]:
        return [self.tokens.card()]

    def status(self) -> SwarmStatus:
        return self.tokens.status()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        prompt, limit = self._read(request)
        request = with_forced_call(request)
        answer = AnswerEvents(self.tokens.language, prompt, request, self._token_bytes)
        generated, last = 0, None
        untold: list[int] = []  # tokens that no event has told
        cached: list[int] = []
        try:
            # Left before the end is told, so that nothing of the answer is held any more when somebody hears of it.
            async with contextlib.aclosing(
                self.tokens.generate(prompt.tokens, request, limit, cached.append)
            ) as tokens:
                async for token in tokens:
                    generated, last = generated + 1, token
                    untold.append(token)
                    for event in answer.feed(token):
                        if request.count_along:
                            yield Usage(len(prompt.tokens), generated, sum(cached))
                        yield _with_ids(event, untold)
                    if answer.stopped:
                        break
        except Exception as e:
            if self._closed:
                raise EngineClosed() from e
            raise
        ended = answer.stopped or last in self.tokens.language.ends
        if self._closed and not ended:
            raise EngineClosed()
        for event in answer.flush():
            yield _with_ids(event, untold)
        reason = "length" if not ended else "tool_calls" if answer.called else "stop"
        yield Finished(reason, answer.stop_string, tuple(untold))
        yield Usage(len(prompt.tokens), generated, sum(cached))

    def _read(self, request: GenerationRequest) -> tuple[Prompt, int]:
        """The prompt, and how many tokens the answer may have. Raises UserError for what cannot be answered."""
        card = self._card(request.model)
        prompt = self._prompts.encode(request)
        check_token_ids(request.logit_bias, self.tokens.language.vocabulary)
        room = card.context_length - len(prompt.tokens)
        if room < 1:
            raise ContextTooLong(len(prompt.tokens), card.context_length)
        return prompt, min(request.max_tokens or room, room)

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        self._card(request.model)
        if isinstance(request.prompt, str):
            return self._prompts.plain(request.prompt, special=special)
        return self._prompts.encode(request).tokens

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        self._card(model)
        self._prompts.check(tokens)
        return self.tokens.language.tokenizer.decode(list(tokens), skip_special_tokens=False)

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        card = self._card(model)
        self._prompts.check(tokens)
        if not tokens:
            raise UserError("The text is empty. Send at least one token.")
        if len(tokens) > card.context_length:
            raise ContextTooLong(len(tokens), card.context_length)
        try:
            return await self.tokens.embed(list(tokens))
        except Exception as e:
            if self._closed:
                raise EngineClosed() from e
            raise

    def _card(self, model: str) -> ModelCard:
        """The card of the model that is asked for by its name, if this engine still answers and has it."""
        if self._closed:
            raise EngineClosed()
        card = self.tokens.card()
        if model != card.id:
            raise ModelNotFound(model, [card.id])
        return card

    async def close(self) -> None:
        self._closed = True
        await self.tokens.close()


def _with_ids(event: Event, untold: list[int]) -> Event:
    """The event with the ids that no event has told, if it is one that tells them."""
    if not isinstance(event, Token):
        return event
    told = replace(event, ids=tuple(untold))
    untold.clear()
    return told
