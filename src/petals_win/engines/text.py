"""The text half of every engine that speaks token ids: from a request to a prompt, from tokens to the events of an answer.

Knows what a request has to fulfil and when an answer ends. Does not know how tokens are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable

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
        request = with_forced_call(request) or request
        answer = AnswerEvents(self.tokens.language, prompt, request, self._token_bytes)
        generated, last = 0, None
        cached: list[int] = []
        try:
            # Left before the end is told, so that nothing of the answer is held any more when somebody hears of it.
            async with contextlib.aclosing(
                self.tokens.generate(prompt.tokens, request, limit, cached.append)
            ) as tokens:
                async for token in tokens:
                    generated, last = generated + 1, token
                    for event in answer.feed(token):
                        if request.count_along:
                            yield Usage(len(prompt.tokens), generated, sum(cached))
                        yield event
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
            yield event
        reason = "length" if not ended else "tool_calls" if answer.called else "stop"
        yield Finished(reason, stop_string=answer.stop_string)
        yield Usage(len(prompt.tokens), generated, sum(cached))

    def _read(self, request: GenerationRequest) -> tuple[Prompt, int]:
        """The prompt, and how many tokens the answer may have. Raises UserError for what cannot be answered."""
        if self._closed:
            raise EngineClosed()
        card = self.tokens.card()
        if request.model != card.id:
            raise ModelNotFound(request.model, [card.id])
        prompt = self._prompts.encode(request)
        check_token_ids(request.logit_bias, self.tokens.language.vocabulary)
        room = card.context_length - len(prompt.tokens)
        if room < 1:
            raise ContextTooLong(len(prompt.tokens), card.context_length)
        return prompt, min(request.max_tokens or room, room)

    async def close(self) -> None:
        self._closed = True
        await self.tokens.close()
