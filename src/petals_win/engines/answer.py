"""From the tokens of one answer to its events: whole characters, thoughts and calls told from text, up to a stop string.

Knows tokenizers and events. Does not know where tokens come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tokenizers.decoders import DecodeStream

from petals_win.engines.base import Event, GenerationRequest, Token
from petals_win.engines.chosen import TokenBytes, ToldTokens
from petals_win.engines.prompts import Prompt
from petals_win.engines.stopping import StopStrings, WithoutRepeat
from petals_win.engines.tokens import Language

_BROKEN = "\ufffd"  # stands for bytes that are no character


class AnswerEvents:
    """Makes events of the tokens of one answer, as they come."""

    def __init__(self, language: Language, prompt: Prompt, request: GenerationRequest, token_bytes: TokenBytes):
        self._parser = prompt.parser
        self._controls: Mapping[int, str] = {} if prompt.parser is None else prompt.parser.controls
        self._stop_tokens = frozenset(request.stop_tokens)
        self._text = _Text(language, prompt)
        self._stops = StopStrings(request.stop)
        self._told = ToldTokens(token_bytes)
        # Whether the answer is complete, by a stop string or token, or as it may have no more calls.
        self.stopped = False

    @property
    def called(self) -> bool:
        """Whether the model has called a tool."""
        return self._parser is not None and self._parser.called

    @property
    def stop_string(self) -> str | None:
        """The stop string that is complete."""
        return self._stops.met

    def feed(self, token: int) -> list[Event]:
        """Take the next token and return what may be shown now."""
        if token in self._stop_tokens:
            self.stopped = True
            return []
        if (control := self._controls.get(token)) is not None:
            text = self._text.flush() + control
        else:
            text = self._text.feed(token)
        self._told.came(token, len(text))
        return self._shown(text) if text else []

    def flush(self) -> list[Event]:
        """What is still held back, at the end of the answer; nothing behind a stop string."""
        if self._stops.stopped:
            return []
        events = self._shown(self._text.flush())
        if self._parser is not None and not self._stops.stopped:
            events += self._with_tokens(self._before_a_stop(self._parser.finish()))
        if rest := self._stops.flush():
            events.append(Token(rest, self._told.shown(rest) if self._parser is None else self._told.held()))
        return events

    def _shown(self, text: str) -> list[Event]:
        if self._parser is not None:
            events = self._with_tokens(self._before_a_stop(self._parser.feed(text)))
            self.stopped |= self._parser.stopped
            return events
        shown = self._stops.feed(text)
        self.stopped = self._stops.stopped
        return [Token(shown, self._told.shown(shown))] if shown else []

    def _with_tokens(self, events: list[Event]) -> list[Event]:
        """With the tokens that came since the last text; those of thoughts and calls are not told."""
        if not events:
            return []
        held = self._told.held()
        last = max((number for number, event in enumerate(events) if isinstance(event, Token)), default=None)
        if held and last is not None:
            events[last] = replace(events[last], chosen=held)  # type: ignore[arg-type]
        return events

    def _before_a_stop(self, events: Iterable[Event]) -> list[Event]:
        """Stop strings are looked for in the text, but not in thoughts and calls, nor across these."""
        kept: list[Event] = []
        for event in events:
            text = self._stops.feed(event.text) if isinstance(event, Token) else self._stops.flush()
            if text:
                kept.append(Token(text))
            if self._stops.stopped:
                self.stopped = True
                break
            if not isinstance(event, Token):
                kept.append(event)
        return kept


class _Text:
    """The text of tokens, without what the reader of a continued text has already, and without control tokens."""

    def __init__(self, language: Language, prompt: Prompt):
        self._tokenizer = language.tokenizer.backend_tokenizer
        # Some tokenizers leave out the blank before the first word of a text, which this one may not be.
        self._before = prompt.before
        self._decode = DecodeStream(ids=prompt.before, skip_special_tokens=True)
        self._new = WithoutRepeat(prompt.blanks)
        self._incomplete: list[int] = []  # tokens of which nothing has been seen

    def feed(self, token: int) -> str:
        """The characters that are complete now."""
        if piece := self._decode.step(self._tokenizer, token):
            self._incomplete.clear()
            return self._new.feed(piece)
        self._incomplete.append(token)
        return ""

    def flush(self) -> str:
        """What is left of a character that has begun and does not go on."""
        if not self._incomplete:
            return ""
        rest = self._tokenizer.decode(self._incomplete, skip_special_tokens=True)
        if not rest.endswith(_BROKEN):
            return ""
        self._decode = DecodeStream(ids=self._before, skip_special_tokens=True)
        self._incomplete.clear()
        return self._new.feed(rest)
