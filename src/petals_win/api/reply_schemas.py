"""What is sent, for /openapi.json. Knows the shape of replies; the replies themselves are made elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from petals_win.api.documented import whole_bounds


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


class Worker(_Reply):
    """A PC that answers questions by itself."""

    address: str
    state: Literal["ready", "waiting", "draining", "gone", "refused"]
    detail: str = Field(description="a sentence for people")
    name: str | None
    models: list[str]
    running: int
    waiting: int
    slots: int = Field(description="answers that it computes at once")
    tokens_per_s: float | None = Field(description="of one answer alone, as far as it was measured")


class EngineState(_Reply):
    """What computes answers with some of the models, and whether these are in memory."""

    engine: str = Field(description="as --engine has it")
    models: list[str]
    state: Literal["loaded", "loading", "unloaded", "failed"]
    detail: str = Field(description="a sentence for people")
    ready: bool = Field(description="whether it can answer, be it after loading")
    running: int
    waiting: int = Field(description="questions that wait until it is loaded")
    num_blocks: int
    missing_blocks: list[int]
    peers: list[Peer]
    cache_usage: float | None


class Readiness(_Reply):
    ready: bool
    detail: str = Field(description="a sentence for people")
    missing_blocks: list[int]
    peers: list[Peer]
    num_blocks: int
    cache_usage: float | None = Field(description="of the memory for conversations, where this PC computes alone")
    workers: list[Worker] = Field(description="with --workers")
    engines: list[EngineState] = Field(description="those of this PC, also if there is one")


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
    """A name that can be asked for. `root` is the model's own, which answers carry; under an alias it differs from `id`."""

    id: str
    root: str
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
ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class TokenLogprob(_Reply):
    token: str = Field(description="its text; bytes that are no whole characters are written as \\xf0\\x9f")
    bytes: list[int]
    logprob: float


class ChosenTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob] = Field(description="as many as top_logprobs asked for, the likeliest first")


class ChatLogprobs(_Reply):
    """The tokens of a text, by the model's own logits: before temperature, penalties and all that limits a choice."""

    content: list[ChosenTokenLogprob]
    refusal: None


class CalledFunctionReply(_Reply):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it")


class ToolCallReply(_Reply):
    id: str
    type: Literal["function"]
    function: CalledFunctionReply


_Reasoning = Annotated[str, Field(description="what a model that thinks wrote before its answer, if there is any")]


class AssistantMessage(_Reply):
    role: Literal["assistant"]
    content: str | None = Field(description="null if the message has calls only")
    refusal: None
    reasoning_content: _Reasoning = ""
    reasoning: _Reasoning = ""
    tool_calls: list[ToolCallReply] = []
    function_call: CalledFunctionReply | None = Field(
        default=None, description="of a request with functions, in the place of tool_calls"
    )


class ChatChoice(_Reply):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenCounts


class FunctionPiece(_Reply):
    name: str = Field(default="", description="in the first piece of a call")
    arguments: str


class ToolCallPiece(_Reply):
    """A call begins with its id, type and name; the pieces of its arguments follow."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionPiece


class Delta(_Reply):
    role: Literal["assistant"] = "assistant"
    content: str | None = ""
    reasoning_content: _Reasoning = ""
    reasoning: _Reasoning = ""
    tool_calls: list[ToolCallPiece] = []
    function_call: FunctionPiece | None = None


class ChunkChoice(_Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(_Head):
    """One event of a streamed chat; usage is there if stream_options asks for it: it counts in the last one, or in each."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: TokenCounts | None = None


class TextLogprobs(_Reply):
    """The tokens of a text, by the model's own logits; bytes that are no whole characters are written as bytes:\\xf0."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(description="as many as logprobs asked for, and the chosen one")
    text_offset: list[int] = Field(description="characters of the answer before each token")


class TextChoice(_Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: TokenCounts


class TextChunkChoice(_Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletionChunk(_Head):
    """One event of a streamed completion; usage is there if stream_options asks for it: it counts in the last one, or in each."""

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
    415: "The request body is not JSON.",
    429: "Too many requests are being answered or wait. Retry-After says when to try again (s).",
    500: "An error inside petals-win.",
    503: "The swarm cannot answer now. Retry-After says when to try again (s).",
    504: "Others' answers took so long that this one was not begun.",
}


def errors(*statuses: int, body: type[BaseModel] = ErrorReply) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of these statuses."""
    return {status: {"model": body, "description": _STATUSES[status]} for status in statuses}


def whole_or_streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of an answer that comes whole or, if "stream" is true, in chunks."""
    streamed = event("A chunk, or an error if the answer breaks.", chunk, ErrorReply, last="[DONE]")
    return {200: {"model": whole, "description": "The answer, whole or as a stream.", "content": streamed}}


def events_of(data: type[BaseModel], description: str) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of server-sent events whose data is of this shape, which another route answers whole."""
    return {200: {"description": description, "content": event("JSON", data)}}


def event(description: str, *data: type[BaseModel], last: str | None = None) -> dict[str, Any]:
    """What `content` says of server-sent events: each as an object of its fields, as OpenAPI 3.2 tells of streams.

    The data is JSON of one of the models, or of any kind without them; `last` is what stands in its place at the end.
    """
    told: dict[str, Any] = {"type": "string", "contentMediaType": "application/json"}
    if data:
        told["contentSchema"] = {"anyOf": [{"$ref": f"#/components/schemas/{each.__name__}"} for each in data]}
    if last is not None:
        told = {"anyOf": [{"const": last}, told]}
    told["description"] = description
    fields = {"data": told, "event": {"type": "string"}}
    return {"text/event-stream": {"itemSchema": {"type": "object", "properties": fields, "required": ["data"]}}}


def complete(openapi: dict[str, Any]) -> dict[str, Any]:
    """Bring FastAPI's description to what is sent: no 422, which is a 400 here, 415, 431, and the schemas of the chunks."""
    for path in openapi["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            responses.pop("422", None)
            # In the form that this path's errors have: of guards, which is that of a 403, and of its own.
            responses.setdefault("431", {"description": _STATUSES[431], "content": responses["403"]["content"]})
            if "requestBody" in operation:
                responses.setdefault("415", {"description": _STATUSES[415], "content": responses["400"]["content"]})
    schemas = openapi["components"]["schemas"]
    for of_fastapi in ("HTTPValidationError", "ValidationError"):
        schemas.pop(of_fastapi, None)
    for chunk in (ChatCompletionChunk, TextCompletionChunk):
        schema = chunk.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        schemas.update(schema.pop("$defs", {}))
        schemas[chunk.__name__] = schema
    whole_bounds(openapi)
    return openapi
