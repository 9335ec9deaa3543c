"""What is sent, for /openapi.json. Knows the shape of replies; the replies themselves are made elsewhere."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Reply):
    message: str = Field(description="a sentence for people")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="the field that it is about")
    code: str | None = Field(description="for programs, e.g. model_not_found")


class ErrorReply(_Reply):
    """Body of every answer that is no success, and the last event of a stream that breaks."""

    error: ErrorDetail


class Health(_Reply):
    status: Literal["ok"]
    version: str


class Peer(_Reply):
    peer_id: str
    start_block: int
    end_block: int
    name: str | None
    throughput: float | None = Field(description="tokens per second of one block, as the node says")
    cache_tokens_left: int | None = Field(description="tokens that it has room for")
    relayed: bool | None = Field(description="whether it is reached through another PC")


class Readiness(_Reply):
    ready: bool
    detail: str = Field(description="a sentence for people")
    missing_blocks: list[int]
    peers: list[Peer]
    num_blocks: int
    cache_usage: float | None = Field(description="of the memory for conversations, where this PC computes alone")


class Block(_Reply):
    block: int
    peer_ids: list[str] = Field(description="who serves it; nobody where this PC computes alone")
    missing: bool


class Swarm(Readiness):
    """The state of the swarm, block by block."""

    object: Literal["swarm"]
    model: str
    blocks: list[Block]


class Model(_Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int = Field(description="tokens of prompt and answer together")


class ModelList(_Reply):
    object: Literal["list"]
    data: list[Model]


class PromptTokenCounts(_Reply):
    cached_tokens: int = Field(description="at the beginning, which an earlier request had left computed")


class TokenCounts(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenCounts


class _Head(_Reply):
    id: str
    created: int
    model: str
    system_fingerprint: None


FinishReason = Literal["stop", "length"]


class AssistantMessage(_Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Reply):
    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenCounts


class Delta(_Reply):
    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(_Reply):
    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Head):
    """One event of a streamed chat; usage is there if stream_options asks for it, and counts in the last one."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: TokenCounts | None = None


class TextChoice(_Reply):
    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: TokenCounts


class TextChunkChoice(_Reply):
    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class TextCompletionChunk(_Head):
    """One event of a streamed completion; usage is there if stream_options asks for it, and counts in the last one."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: TokenCounts | None = None


_STATUSES = {
    400: "The request cannot be answered; the sentence says why.",
    401: "Where the server has keys: none of them was sent.",
    403: "The name by which the server was asked, or the page that asked, is not allowed.",
    404: "There is no such model here.",
    408: "The request was not complete in time.",
    413: "The request is too large.",
    431: "The request has too many headers, or too long ones.",
    429: "Too many requests are being answered or wait. Retry-After says when to try again (s).",
    500: "An error inside petals-win.",
    503: "The swarm cannot answer now. Retry-After says when to try again (s).",
}


def errors(*statuses: int, body: type[BaseModel] = ErrorReply) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of these statuses."""
    return {status: {"model": body, "description": _STATUSES[status]} for status in statuses}


def whole_or_streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of an answer that comes whole or, if "stream" is true, in chunks."""
    streamed = {
        "type": "string",
        "description": "Events whose data is a chunk each; the last one is [DONE], or an error if the answer breaks.",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{chunk.__name__}"},
    }
    content = {"text/event-stream": {"schema": streamed}}
    return {200: {"model": whole, "description": "The answer, whole or as a stream.", "content": content}}


def events_of(data: type[BaseModel], description: str) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of server-sent events whose data is of this shape, which another route answers whole."""
    streamed = {
        "type": "string",
        "description": "Events whose data is JSON each.",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{data.__name__}"},
    }
    return {200: {"description": description, "content": {"text/event-stream": {"schema": streamed}}}}


def complete(openapi: dict[str, Any]) -> dict[str, Any]:
    """Bring FastAPI's description to what is sent: no 422, which is a 400 here, and the schemas of the chunks."""
    for path in openapi["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            too_long = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
            operation["responses"].setdefault("431", {"description": _STATUSES[431], "content": too_long})
    schemas = openapi["components"]["schemas"]
    for of_fastapi in ("HTTPValidationError", "ValidationError"):
        schemas.pop(of_fastapi, None)
    for chunk in (ChatCompletionChunk, TextCompletionChunk):
        schema = chunk.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        schemas.update(schema.pop("$defs", {}))
        schemas[chunk.__name__] = schema
    return openapi
