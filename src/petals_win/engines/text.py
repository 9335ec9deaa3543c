"""The text half of every engine that speaks token ids: from a request to a prompt, from tokens to the events of an answer.

Knows tokenizers, stop strings and what a request has to fulfil. Does not know how tokens are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence

from tokenizers.decoders import DecodeStream

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
from petals_win.engines.forced_calls import ForcedCall, with_forced_call
from petals_win.engines.prompts import Prompt, PromptEncoder
from petals_win.engines.sampling import check_token_ids
from petals_win.engines.stopping import StopStrings, WithoutRepeat
from petals_win.engines.tokens import Language, TokenEngine
from petals_win.errors import UserError


class TextEngine:
    """An Engine, made of a TokenEngine: `tokens`."""

    def __init__(self, tokens: TokenEngine):
        self.tokens = tokens
        self._prompts = PromptEncoder(tokens.card().id, tokens.language.tokenizer, tokens.language.vocabulary)
        self._closed = False

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        await self.tokens.start(on_lost)

    def models(self) -> list[ModelCard]:
        return [self.tokens.card()]

    def status(self) -> SwarmStatus:
        return self.tokens.status()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        prompt, limit = self._read(request)
        call = None
        if forced := with_forced_call(request):
            request, call = forced, ForcedCall()
        text = _AnswerText(self.tokens.language, prompt, request.stop)
        generated, last = 0, None
        cached: list[int] = []
        try:
            # Left before the end is told, so that nothing of the answer is held any more when somebody hears of it.
            async with contextlib.aclosing(
                self.tokens.generate(prompt.tokens, request, limit, cached.append)
            ) as tokens:
                async for token in tokens:
                    generated, last = generated + 1, token
                    for event in _shown(text.feed(token), call):
                        yield event
                    if text.stopped:
                        break
        except Exception as e:
            if self._closed:
                raise EngineClosed() from e
            raise
        ended = text.stopped or last in self.tokens.language.ends
        if self._closed and not ended:
            raise EngineClosed()
        for event in _shown(text.flush(), call):
            yield event
        for event in call.flush(ended) if call else ():
            yield event
        yield Finished("length" if not ended else "tool_calls" if call else "stop")
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


def _shown(piece: str, call: ForcedCall | None) -> Sequence[Event]:
    """The events that a piece of text is, of an answer or of the call that it has to be."""
    if call is not None:
        return call.feed(piece)
    return [Token(piece)] if piece else []


class _AnswerText:
    """The text of one answer, token by token: whole characters, without what the reader has already, up to a stop string."""

    def __init__(self, language: Language, prompt: Prompt, stop: tuple[str, ...]):
        self._tokenizer = language.tokenizer.backend_tokenizer
        # Some tokenizers leave out the blank before the first word of a text, which this one may not be.
        self._decode = DecodeStream(ids=prompt.before, skip_special_tokens=True)
        self._new, self._stops = WithoutRepeat(prompt.blanks), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.stopped

    def feed(self, token: int) -> str:
        """Take the next token and return what may be shown now."""
        return self._stops.feed(self._new.feed(self._decode.step(self._tokenizer, token) or ""))

    def flush(self) -> str:
        """What is still held back, at the end of the answer; nothing behind a stop string."""
        return self._stops.flush()
