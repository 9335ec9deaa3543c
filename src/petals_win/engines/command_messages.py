"""The messages of docs/command-engine.md that a runtime sends, one JSON object a line, and how they are read.

Knows the protocol's fields and limits. Does not know processes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

VERSION = 1

_Id = Annotated[str, Field(min_length=1, max_length=64)]
_Count = Annotated[int, Field(ge=0, le=2**31)]
Input = Literal["messages", "text"]
Sampling = Literal[
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
]
Option = Literal[
    Sampling,
    "json_schema",
    "regex",
    "grammar",
    "chat_template_kwargs",
    "continue_final_message",
]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Hello(_Message):
    type: Literal["hello"]
    version: int
    inputs: Annotated[list[Input], Field(min_length=1)] = ["messages"]
    options: Annotated[list[str], Field(max_length=100)] = []  # those of a later version mean nothing here
    at_once: Annotated[int, Field(ge=1, le=1024)] = 1


class Loaded(_Message):
    type: Literal["loaded"]
    model: Annotated[str, Field(max_length=200)]
    context_length: Annotated[int, Field(ge=2, le=2**31)] | None = None


class Started(_Message):
    type: Literal["started"]
    id: _Id
    prompt_tokens: _Count
    cached_tokens: _Count = 0


class TokenPiece(_Message):
    type: Literal["token"]
    id: _Id
    text: str
    tokens: Annotated[int, Field(ge=1, le=2**31)] = 1
    thought: bool = False


class Done(_Message):
    type: Literal["done"]
    id: _Id
    reason: Literal["stop", "length", "cancelled"]


class Failure(_Message):
    type: Literal["error"]
    id: _Id | None = None
    kind: Literal["refused", "context", "full", "failed"] = "failed"
    message: Annotated[str, Field(max_length=10_000)] = ""
    prompt_tokens: _Count = 0


class Pong(_Message):
    type: Literal["pong"]


Message = Hello | Loaded | Started | TokenPiece | Done | Failure | Pong
_READ: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


class Violation(Exception):
    """The runtime does not keep to the protocol; the text says how, as the end of a sentence."""


def read_message(line: bytes) -> Message:
    """The message in a line. Raises Violation; what it says repeats nothing of the line."""
    try:
        return _READ.validate_json(line)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Violation(f"it sent a line that is no message: {where + ': ' if where else ''}{first['type']}") from None
