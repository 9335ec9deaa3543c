"""The replies of Ollama's API, whole or in lines. Knows their shape; not where the events of an answer come from."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from petals_win.api.errors import ApiError, ollama_body
from petals_win.api.generations import Answer
from petals_win.api.messages import arguments_as_object
from petals_win.api.streaming import json_line
from petals_win.engines.base import (
    ChosenToken,
    Finished,
    Thought,
    Token,
    TokenProbability,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)

_NEVER = -9999.0  # JSON has no infinity


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OllamaError(_Reply):
    """Body of every answer that is no success, and the last line of a stream that breaks."""

    error: str = Field(description="a sentence for people")


class OllamaCalledFunction(_Reply):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCall(_Reply):
    id: str
    function: OllamaCalledFunction


class OllamaAnswer(_Reply):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class OllamaProbability(_Reply):
    token: str
    logprob: float
    bytes: list[int]


class OllamaChosen(OllamaProbability):
    top_logprobs: list[OllamaProbability] | None = None


class _Head(_Reply):
    """What is there of an answer so far, or all of it; the counts and times (ns) come with its end."""

    model: str
    created_at: str
    done: bool
    logprobs: list[OllamaChosen] | None = None
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChatReply(_Head):
    message: OllamaAnswer


class OllamaGenerateReply(_Head):
    response: str
    thinking: str | None = None


@dataclass
class _Piece:
    """What came of an answer: of everything that a reply can have, some."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: _Piece) -> None:
        self.text += other.text
        self.thinking += other.thinking
        self.calls += other.calls
        self.logprobs += other.logprobs


class ChatShape:
    """Replies of /api/chat."""

    @staticmethod
    def body(piece: _Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text}
        if piece.thinking:
            message["thinking"] = piece.thinking
        if piece.calls:
            message["tool_calls"] = piece.calls
        return {"message": message}


class GenerateShape:
    """Replies of /api/generate, which calls no tools."""

    @staticmethod
    def body(piece: _Piece) -> dict[str, Any]:
        return {"response": piece.text} | ({"thinking": piece.thinking} if piece.thinking else {})


Shape = type[ChatShape] | type[GenerateShape]


async def whole(answer: Answer, shape: Shape, model: str) -> dict[str, Any]:
    """The reply when it is complete. `model` is its name as it was asked for: programs compare it."""
    reading = _Reading(answer)
    everything = _Piece()
    async for piece in reading.pieces():
        everything.add(piece)
    return _line(shape, model, everything, done=True) | reading.end()


async def lines(answer: Answer, shape: Shape, model: str) -> AsyncGenerator[bytes, None]:
    """The reply piece by piece; the last line is its end, or an error if the answer breaks."""
    reading = _Reading(answer)
    try:
        async for piece in reading.pieces():
            yield json_line(_line(shape, model, piece))
    except ApiError as error:
        yield json_line(ollama_body(error))
        return
    yield json_line(_line(shape, model, done=True) | reading.end())


def nothing_yet(shape: Shape, model: str) -> bytes:
    """A line without any text, which keeps a connection open."""
    return json_line(_line(shape, model))


def loaded(shape: Shape, model: str, reason: Literal["load", "unload"]) -> dict[str, Any]:
    """What is answered to a request without a prompt: the model is there, or goes as soon as it is idle."""
    return _line(shape, model, done=True) | {"done_reason": reason}


def now() -> str:
    return _time(datetime.now(UTC))


def since(created: float) -> str:
    """A time in Unix seconds, as Ollama writes times."""
    return _time(datetime.fromtimestamp(created, UTC))


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _line(shape: Shape, model: str, piece: _Piece | None = None, done: bool = False) -> dict[str, Any]:
    piece = piece or _Piece()
    line = {"model": model, "created_at": now(), **shape.body(piece), "done": done}
    return line | ({"logprobs": piece.logprobs} if piece.logprobs else {})


class _Reading:
    """Reads the events of an answer, and measures it."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._begun = time.perf_counter_ns()
        self._first: int | None = None
        self._reason = ""
        self._usage = Usage(0, 0)

    async def pieces(self) -> AsyncIterator[_Piece]:
        """What came, a piece for each event; a call of a tool comes when it is complete. Raises ApiError."""
        call: _Call | None = None
        async for _, event in self._answer:
            if self._first is None:
                self._first = time.perf_counter_ns()
            if call is not None and not isinstance(event, ToolCallArguments):
                yield call.piece()
                call = None
            match event:
                case Token(text, chosen):
                    yield _Piece(text=text, logprobs=[_chosen(token) for token in chosen])
                case Thought(text):
                    yield _Piece(thinking=text)
                case ToolCallBegun():
                    call = _Call(event)
                case ToolCallArguments(_, text) if call is not None:
                    call.arguments += text
                case Finished(reason):
                    # That it ends in calls shows by the calls.
                    self._reason = "length" if reason == "length" else "stop"
                case Usage():
                    self._usage = event

    def end(self) -> dict[str, Any]:
        """Why it ended, what it had of tokens, and how long it took (ns); a model here is always loaded."""
        now = time.perf_counter_ns()
        first = self._first or now
        return {
            "done_reason": self._reason,
            "total_duration": now - self._begun,
            "load_duration": 0,
            "prompt_eval_count": self._usage.prompt_tokens,
            "prompt_eval_duration": first - self._begun,
            "eval_count": self._usage.completion_tokens,
            "eval_duration": now - first,
        }


class _Call:
    """A call of a tool of which the arguments still come."""

    def __init__(self, begun: ToolCallBegun):
        self._begun = begun
        self.arguments = ""

    def piece(self) -> _Piece:
        """The call; as text if its arguments are no object, since nothing else can be said in this shape."""
        arguments = arguments_as_object(self.arguments)
        if arguments is None:
            return _Piece(text=f"{self._begun.name}({self.arguments})")
        function = {"index": self._begun.index, "name": self._begun.name, "arguments": arguments}
        return _Piece(calls=[{"id": self._begun.id, "function": function}])


def _chosen(token: ChosenToken) -> dict[str, Any]:
    likeliest = [_probability(other) for other in token.likeliest]
    return _probability(token) | ({"top_logprobs": likeliest} if likeliest else {})


def _probability(token: TokenProbability) -> dict[str, Any]:
    return {
        "token": token.text.decode("utf-8", "replace"),
        "logprob": max(token.logprob, _NEVER),
        "bytes": list(token.text),
    }
