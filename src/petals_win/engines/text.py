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
from petals_win.engines.chosen import TokenBytes, ToldTokens
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
        text = _AnswerText(self.tokens.language, prompt, request.stop)
        told = ToldTokens(self._token_bytes)
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
                    piece = text.feed(token)
                    told.came(token, text.length)
                    if piece:
                        if request.count_along:
                            yield Usage(len(prompt.tokens), generated, sum(cached))
                        yield Token(piece, told.shown(piece), tuple(untold))
                        untold.clear()
                    if text.stopped:
                        break
        except Exception as e:
            if self._closed:
                raise EngineClosed() from e
            raise
        ended = text.stopped or last in self.tokens.language.ends
        if self._closed and not ended:
            raise EngineClosed()
        if rest := text.flush():
            yield Token(rest, told.shown(rest), tuple(untold))
            untold.clear()
        yield Finished("stop" if ended else "length", tuple(untold))
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

    def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        self._card(request.model)
        if isinstance(request.prompt, str):
            return self._prompts.plain(request.prompt, special=special)
        return self._prompts.encode(request).tokens

    def detokenize(self, model: str, tokens: Sequence[int]) -> str:
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


class _AnswerText:
    """The text of one answer, token by token: whole characters, without what the reader has already, up to a stop string."""

    def __init__(self, language: Language, prompt: Prompt, stop: tuple[str, ...]):
        self._tokenizer = language.tokenizer.backend_tokenizer
        # Some tokenizers leave out the blank before the first word of a text, which this one may not be.
        self._decode = DecodeStream(ids=prompt.before, skip_special_tokens=True)
        self._new, self._stops = WithoutRepeat(prompt.blanks), StopStrings(stop)
        self.length = 0  # of the text so far, in characters, with what is held back

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.stopped

    def feed(self, token: int) -> str:
        """Take the next token and return what may be shown now."""
        text = self._new.feed(self._decode.step(self._tokenizer, token) or "")
        self.length += len(text)
        return self._stops.feed(text)

    def flush(self) -> str:
        """What is still held back, at the end of the answer; nothing behind a stop string."""
        return self._stops.flush()
