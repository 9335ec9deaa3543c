"""What another server's stream says, as the events of an answer: text, thoughts, calls of tools, counts, the reason of its end.

Knows OpenAI's chunks, of chats and of plain completions, and what other servers add to them. Does not know HTTP.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from petals_win.engines.base import (
    ChosenToken,
    Event,
    GenerationRequest,
    Thought,
    Token,
    TokenProbability,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)
from petals_win.engines.outside import HeldTokens, ProgramFailed, guessed_tokens
from petals_win.engines.stopping import StopStrings
from petals_win.errors import UserError, printable

_MOST_TEXT = 64 * 2**20  # characters of an answer
_UNKNOWN = -1  # the id of a token of which only the text is told
_ESCAPED = re.compile(r"(?:bytes:)?((?:\\x[0-9a-f]{2})+)")
_REASONS: dict[str, Literal["stop", "length", "tool_calls"]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class StreamEvents:
    """Makes events of the data of one answer, as it comes. Raises ProgramFailed for what makes no sense."""

    def __init__(self, request: GenerationRequest):
        self._stops = StopStrings(request.stop)
        self._held = HeldTokens()
        self._likeliest = request.logprobs
        self._calls: list[int] = []  # the server's indices of those that have begun
        self._characters = 0
        self._pieces = 0
        self._guess = guessed_tokens(json.dumps(request.messages) if request.prompt is None else str(request.prompt))
        self._usage: dict[str, Any] = {}
        self.reason: Literal["stop", "length", "tool_calls"] | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that is complete."""
        return self._stops.met

    @property
    def usage(self) -> Usage:
        """The counts so far, as the server says, or guessed where it says nothing."""
        details = self._usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else 0
        return Usage(
            _count(self._usage.get("prompt_tokens"), self._guess),
            _count(self._usage.get("completion_tokens"), self._pieces),
            _count(cached, 0),
        )

    def feed(self, data: str) -> list[Event]:
        """Take the data of the next server-sent event."""
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise ProgramFailed("The other server sent an event that is no JSON. Try again.") from None
        if not isinstance(chunk, dict):
            raise ProgramFailed("The other server sent an event that is no object. Try again.")
        if (error := chunk.get("error")) is not None:
            said = error.get("message") if isinstance(error, dict) else error
            raise ProgramFailed(f"The other server broke off its answer: {printable(str(said))}")
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = usage
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return []
        events = self._choice(choices[0])
        self._pieces += bool(events)
        return events

    def flush(self) -> list[Event]:
        """What is still held back, at the end of the answer."""
        rest = self._stops.flush()
        return [Token(rest, self._held.shown(rest))] if rest else []

    def _choice(self, choice: dict[str, Any]) -> list[Event]:
        events: list[Event] = []
        chat = isinstance(choice.get("delta"), dict)
        delta = choice["delta"] if chat else {"content": choice.get("text")}
        self._held.came(self._chosen(choice.get("logprobs"), chat))
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str) and thought:
            events.append(Thought(self._sound(thought)))
        text = delta.get("content")
        if isinstance(text, str) and text and (shown := self._stops.feed(self._sound(text))):
            events.append(Token(shown, self._held.shown(shown)))
        for call in delta.get("tool_calls") or ():
            if not self._stops.stopped:
                events += self._call(call)
        if (reason := choice.get("finish_reason")) is not None:
            if reason not in _REASONS:
                raise UserError(f"The other server ended the answer by {printable(str(reason))!r}, not by itself.")
            # Some servers say "stop" of a turn that calls tools, and some the other way round.
            ended = _REASONS[reason]
            self.reason = "length" if ended == "length" else "tool_calls" if self._calls else "stop"
        return events

    def _call(self, call: Any) -> list[Event]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ProgramFailed("The other server sent a call of a tool that is none. Try again.")
        events: list[Event] = list(self.flush())
        place = call.get("index", len(self._calls))
        if place not in self._calls:
            name = function.get("name")
            if not isinstance(name, str) or not name:
                raise ProgramFailed("The other server sent a call of a tool without a name. Try again.")
            self._calls.append(place)
            index = len(self._calls) - 1
            events.append(ToolCallBegun(index, self._sound(str(call.get("id") or f"call_{index}")), self._sound(name)))
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        if isinstance(arguments, str) and arguments:
            events.append(ToolCallArguments(self._calls.index(place), self._sound(arguments)))
        return events

    def _chosen(self, told: Any, chat: bool) -> list[ChosenToken]:
        if self._likeliest is None or not isinstance(told, dict):
            return []
        try:
            if chat:
                return [self._token(each, each["top_logprobs"]) for each in told.get("content") or ()]
            likeliest = told.get("top_logprobs") or [{}] * len(told["tokens"])
            return [
                self._token(
                    {"token": token, "logprob": logprob},
                    [{"token": name, "logprob": value} for name, value in (others or {}).items()],
                )
                for token, logprob, others in zip(told["tokens"], told["token_logprobs"], likeliest, strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ProgramFailed("The other server's log probabilities cannot be read. Leave out logprobs.") from None

    def _token(self, told: dict[str, Any], others: list[dict[str, Any]]) -> ChosenToken:
        likeliest = sorted((_probability(each) for each in others), key=lambda each: -each.logprob)
        chosen = _probability(told)
        return ChosenToken(_UNKNOWN, chosen.text, chosen.logprob, tuple(likeliest[: self._likeliest]))

    def _sound(self, text: str) -> str:
        """The text, which has no half characters and is not endless."""
        self._characters += len(text)
        if self._characters > _MOST_TEXT:
            raise ProgramFailed("The other server's answer has no end.")
        return text.encode(errors="replace").decode()


def _probability(told: dict[str, Any]) -> TokenProbability:
    name, data = told["token"], told.get("bytes")
    if isinstance(data, list):
        text = bytes(data)
    elif (escaped := _ESCAPED.fullmatch(name)) is not None:
        text = bytes.fromhex(escaped[1].replace("\\x", ""))
    else:
        text = name.encode(errors="replace")
    return TokenProbability(_UNKNOWN, text, float(told["logprob"]))


def _count(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise
