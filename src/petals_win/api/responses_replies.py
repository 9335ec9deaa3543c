"""What /v1/responses sends: items of an answer as they come, with the events that tell of them, and the response as a whole.

Knows OpenAI's names for all of this. Does not know where the events of an answer come from.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal

from pydantic import BaseModel, Field

from petals_win.api.errors import ApiError
from petals_win.api.generations import Answer
from petals_win.api.responses_schemas import ResponsesRequest
from petals_win.api.streaming import json_event
from petals_win.engines.base import Event, Finished, Thought, Token, ToolCallArguments, ToolCallBegun, Usage


class ResponseReply(BaseModel):
    """A response of OpenAI's. Items of its output are of type reasoning, message or function_call."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: bool = Field(description="false: nothing is stored")
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: dict[str, Any] | None
    user: None


async def whole(answer: Answer, asked: ResponsesRequest, model: str) -> dict[str, Any]:
    """The response when it is complete. Raises ApiError where the answer breaks."""
    response = _Response(asked, model)
    async for _, event in answer:
        response.take(event)
    return response.ended()["response"]


async def events(answer: Answer, asked: ResponsesRequest, model: str) -> AsyncGenerator[bytes, None]:
    """The response as it comes."""
    response = _Response(asked, model)
    count = 0

    def numbered(bodies: list[dict[str, Any]]) -> list[bytes]:
        nonlocal count
        told = []
        for body in bodies:
            told.append(json_event({**body, "sequence_number": count}, body["type"]))
            count += 1
        return told

    for event in numbered(response.begun()):
        yield event
    try:
        async for _, part in answer:
            for event in numbered(response.take(part)):
                yield event
    except ApiError as error:
        for event in numbered([response.failed(error)]):
            yield event
        return
    for event in numbered([*response.closed(), response.ended()]):
        yield event


class _Response:
    """One response in the making. Its methods return the events that tell of what has changed."""

    def __init__(self, asked: ResponsesRequest, model: str):
        self._asked, self._model = asked, model
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._output: list[dict[str, Any]] = []
        self._open = False  # whether the last item may still grow
        self._reason = "stop"
        self._usage: Usage | None = None

    def begun(self) -> list[dict[str, Any]]:
        state = self._body("in_progress")
        return [{"type": "response.created", "response": state}, {"type": "response.in_progress", "response": state}]

    def take(self, event: Event) -> list[dict[str, Any]]:
        match event:
            case Token(text):
                return self._text("message", text)
            case Thought(text):
                return self._text("reasoning", text)
            case ToolCallBegun(_, id, name):
                call = {"type": "function_call", "id": _id("fc"), "call_id": id, "name": name, "arguments": ""}
                return [*self.closed(), self._added(call)]
            case ToolCallArguments(_, text):
                item = self._output[-1]
                item["arguments"] += text
                return [self._at(item, "response.function_call_arguments.delta", delta=text)]
            case Finished(reason):
                self._reason = reason
            case Usage():
                self._usage = event
        return []

    def closed(self) -> list[dict[str, Any]]:
        """The last item is complete."""
        if not self._open:
            return []
        self._open = False
        item = self._output[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        done = {"type": "response.output_item.done", "output_index": len(self._output) - 1, "item": _copy(item)}
        if item["type"] == "function_call":
            return [
                self._at(
                    item, "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
                ),
                done,
            ]
        (part,) = item["content"]
        kind, extra = _KINDS[item["type"]]
        at = {"content_index": 0, **extra}
        return [
            self._at(item, f"response.{kind}.done", text=part["text"], **at),
            self._at(item, "response.content_part.done", content_index=0, part=dict(part)),
            done,
        ]

    def ended(self) -> dict[str, Any]:
        """The last event, after all items are closed."""
        self.closed()
        status = "incomplete" if self._reason == "length" else "completed"
        return {"type": f"response.{status}", "response": self._body(status)}

    def failed(self, error: ApiError) -> dict[str, Any]:
        code = "server_error" if error.status >= 500 else error.code or "invalid_prompt"
        body = self._body("failed") | {"error": {"code": code, "message": str(error)}}
        return {"type": "response.failed", "response": body}

    def _text(self, kind: str, text: str) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        if not self._open or self._output[-1]["type"] != kind:
            told = [*self.closed(), *self._text_begun(kind)]
        item = self._output[-1]
        item["content"][0]["text"] += text
        name, extra = _KINDS[kind]
        return [*told, self._at(item, f"response.{name}.delta", content_index=0, delta=text, **extra)]

    def _text_begun(self, kind: str) -> list[dict[str, Any]]:
        if kind == "message":
            item = {"type": "message", "id": _id("msg"), "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": "reasoning", "id": _id("rs"), "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        added = self._added(item)
        item["content"].append(part)
        return [added, self._at(item, "response.content_part.added", content_index=0, part=dict(part))]

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        item["status"] = "in_progress"
        self._output.append(item)
        self._open = True
        return {"type": "response.output_item.added", "output_index": len(self._output) - 1, "item": _copy(item)}

    def _at(self, item: dict[str, Any], kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": item["id"], "output_index": len(self._output) - 1, **fields}

    def _body(self, status: str) -> dict[str, Any]:
        asked, cut = self._asked, status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": self._model,
            "output": [_copy(item) for item in self._output],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": asked.text.format.model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": asked.tool_choice,
            "tools": asked.tools,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if self._usage is None else _counts(self._usage),
            "user": None,
        }


# What events about the text of an item are called, and what they have beside it.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("output_text", {"logprobs": []}),
    "reasoning": ("reasoning_text", {}),
}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now: the item itself goes on growing."""
    content = {"content": [dict(part) for part in item["content"]]} if "content" in item else {}
    return {**item, **content}


def _counts(usage: Usage) -> dict[str, Any]:
    """Tokens of thoughts are counted with the rest: the protocol of engines does not tell them apart."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
