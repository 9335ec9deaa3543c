"""The replies of Anthropic's Messages API, whole or in events. Knows their shape; not where the events of an answer come from."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from petals_win.api.errors import ApiError, anthropic_body
from petals_win.api.generations import Answer
from petals_win.api.messages import arguments_as_object
from petals_win.api.streaming import json_event
from petals_win.engines.base import Event, Finished, Thought, Token, ToolCallArguments, ToolCallBegun, Usage


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AnthropicErrorDetail(_Reply):
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
    ]
    message: str = Field(description="a sentence for people")


class AnthropicError(_Reply):
    """Body of every answer that is no success, and the data of the last event of a stream that breaks."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class AnthropicText(_Reply):
    type: Literal["text"]
    text: str


class AnthropicThinking(_Reply):
    type: Literal["thinking"]
    thinking: str
    signature: str


class AnthropicToolUse(_Reply):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(description="arguments that are no object are the text under INVALID_JSON")


class AnthropicUsage(_Reply):
    """Tokens of the prompt are computed (input_tokens) or found computed by an earlier request (cache_read_…)."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(_Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnthropicText | AnthropicThinking | AnthropicToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicTokenCount(_Reply):
    input_tokens: int


_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def whole(answer: Answer, model: str) -> dict[str, Any]:
    """The reply when it is complete."""
    content: list[dict[str, Any]] = []
    reading = _Reading(answer)
    async for part in reading.parts():
        match part:
            case {"type": "content_block_start", "content_block": block}:
                content.append(dict(block))
            case {"type": "content_block_delta", "delta": delta}:
                _extend(content[-1], delta)
    for block in content:
        if block["type"] == "tool_use":
            text = block["input"] or ""
            arguments = arguments_as_object(text)
            block["input"] = {"INVALID_JSON": text} if arguments is None else arguments
    return {**_head(model), "content": content, **_end(reading.finished), "usage": _usage(reading.usage)}


async def events(answer: Answer, model: str) -> AsyncGenerator[bytes, None]:
    """The reply piece by piece; the last event is message_stop, or an error if the answer breaks."""
    reading = _Reading(answer)
    begun = {**_head(model), "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(reading.usage)}
    # How many tokens the prompt has is told with the end: it is not known before the engine has said all.
    yield _event({"type": "message_start", "message": begun})
    try:
        async for part in reading.parts():
            yield _event(part)
    except ApiError as error:
        yield _event(anthropic_body(error))
        return
    yield _event({"type": "message_delta", "delta": _end(reading.finished), "usage": _usage(reading.usage)})
    yield _event({"type": "message_stop"})


def ping() -> bytes:
    """What keeps a connection open."""
    return _event({"type": "ping"})


class _Reading:
    """Reads an answer. How it ended, and its counts, are known when all of its parts have come."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.finished, self.usage = Finished("stop"), Usage(0, 0)

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """What tells of its blocks, as it comes. Raises ApiError where the answer breaks."""
        parts = _Parts()
        async for _, event in self._answer:
            match event:
                case Finished():
                    self.finished = event
                case Usage():
                    self.usage = event
                case _:
                    for part in parts.of(event):
                        yield part
        for part in parts.end():
            yield part


class _Parts:
    """Puts the events of an answer into blocks: text, thoughts and each call of a tool have one of their own."""

    def __init__(self) -> None:
        self._kind: str | None = None  # of the block that is open
        self._index = -1

    def of(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Token(text):
                if text:
                    yield from self._in_block({"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": text})
            case Thought(text):
                yield from self._in_block({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCallBegun(_, id, name):
                yield from self.end()
                yield from self._in_block({"type": "tool_use", "id": id, "name": name, "input": {}})
            case ToolCallArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self) -> Iterator[dict[str, Any]]:
        """Close the block that is open, if one is."""
        if self._kind is not None:
            self._kind = None
            yield {"type": "content_block_stop", "index": self._index}

    def _in_block(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Open the block, unless one of its kind is open."""
        if block["type"] != self._kind:
            yield from self.end()
            self._kind = block["type"]
            self._index += 1
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _extend(block: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add what a delta brings to a block. The input of a call is a text until the call is complete."""
    match delta:
        case {"type": "text_delta", "text": text}:
            block["text"] += text
        case {"type": "thinking_delta", "thinking": text}:
            block["thinking"] += text
        case {"type": "input_json_delta", "partial_json": text}:
            block["input"] = (block["input"] or "") + text


def _event(body: dict[str, Any]) -> bytes:
    return json_event(body, name=body["type"])


def _head(model: str) -> dict[str, Any]:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}


def _end(finished: Finished) -> dict[str, Any]:
    reason = "stop_sequence" if finished.stop_string is not None else _REASONS[finished.reason]
    return {"stop_reason": reason, "stop_sequence": finished.stop_string}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
