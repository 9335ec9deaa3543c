"""The choices of OpenAI's replies, whole or in pieces, of chats and of plain completions.

Knows what the events of an answer become. Does not know requests, usage or how a reply is sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from petals_win.api.logprobs import TextLogprobs, of_chat
from petals_win.engines.base import ChosenToken, Event, Thought, Token, ToolCallArguments, ToolCallBegun


class Shape(Protocol):
    """What a choice looks like. `index` is its number in the reply."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int, first: Event) -> dict[str, Any] | None:
        """What a stream says before the first event of a choice."""
        ...

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        """What a stream says of an event, None for nothing."""
        ...

    def closing(self) -> dict[str, Any]:
        """What a stream says beside the reason why a choice has ended."""
        ...

    def whole(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """A choice of which these are all events."""
        ...

    def reason(self, reason: str) -> str:
        """What the reason why a choice has ended is called."""
        ...


class ChatShape:
    """Replies of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, logprobs: bool = False, calls_functions: bool = False):
        """calls_functions: a call is told in the way that was there before tools."""
        self._with_logprobs, self._calls_functions = logprobs, calls_functions

    def opening(self, index: int, first: Event) -> dict[str, Any]:
        content = None if isinstance(first, ToolCallBegun) else ""
        return {"delta": {"role": "assistant", "content": content}, "logprobs": None}

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        match event:
            case Token(text, chosen):
                return {"delta": {"content": text}, "logprobs": self._logprobs(chosen)}
            case Thought(text):
                return {"delta": _thought(text), "logprobs": None}
            case ToolCallBegun(number, id, name):
                call: dict[str, Any] = {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            case ToolCallArguments(number, text):
                call = {"function": {"arguments": text}}
            case _:
                return None
        if self._calls_functions:
            return {"delta": {"function_call": call["function"]}, "logprobs": None}
        return {"delta": {"tool_calls": [{"index": number, **call}]}, "logprobs": None}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def whole(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            match event:
                case ToolCallBegun(number, id, name):
                    calls[number] = {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                case ToolCallArguments(number, text):
                    calls[number]["function"]["arguments"] += text
        text = "".join(event.text for event in events if isinstance(event, Token))
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thoughts := "".join(event.text for event in events if isinstance(event, Thought)):
            message |= _thought(thoughts)
        if calls and self._calls_functions:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = list(calls.values())
        return {"message": message, "logprobs": self._logprobs(_chosen(events))}

    def reason(self, reason: str) -> str:
        return "function_call" if reason == "tool_calls" and self._calls_functions else reason

    def _logprobs(self, chosen: Iterable[ChosenToken]) -> dict[str, Any] | None:
        return of_chat(chosen) if self._with_logprobs else None


def _thought(text: str) -> dict[str, Any]:
    """Under both names that programs look for."""
    return {"reasoning_content": text, "reasoning": text}


class TextShape:
    """Replies of /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, logprobs: bool = False, echoed: Sequence[str] = ()):
        """echoed: what each choice begins with, if any."""
        self._with_logprobs, self._echoed = logprobs, echoed
        self._told: defaultdict[int, TextLogprobs] = defaultdict(TextLogprobs)

    def opening(self, index: int, first: Event) -> dict[str, Any] | None:
        return {"text": self._echoed[index], "logprobs": None} if self._echoed else None

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        # A text that is continued has no thoughts: what looks like one is part of it.
        if not isinstance(event, (Token, Thought)):
            return None
        return {"text": event.text, "logprobs": self._logprobs(index, _chosen([event]))}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def whole(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text = "".join(event.text for event in events if isinstance(event, (Token, Thought)))
        echoed = self._echoed[index] if self._echoed else ""
        return {"text": echoed + text, "logprobs": self._logprobs(index, _chosen(events))}

    def reason(self, reason: str) -> str:
        return reason

    def _logprobs(self, index: int, chosen: Iterable[ChosenToken]) -> dict[str, Any] | None:
        return self._told[index].piece(chosen) if self._with_logprobs else None


def _chosen(events: Sequence[Event]) -> list[ChosenToken]:
    return [chosen for event in events if isinstance(event, Token) for chosen in event.chosen]
