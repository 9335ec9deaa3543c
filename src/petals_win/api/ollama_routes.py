"""Ollama's API, for programs that speak nothing else. Knows its routes; what is sent and asked is in the files beside it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response

from petals_win.api import ollama_replies, reply_schemas
from petals_win.api.answering import answer_streamed, answer_whole, unless_disconnected
from petals_win.api.errors import ApiError
from petals_win.api.generations import Generations
from petals_win.api.ollama_replies import (
    ChatShape,
    GenerateShape,
    OllamaChatReply,
    OllamaError,
    OllamaGenerateReply,
    Shape,
)
from petals_win.api.ollama_schemas import OllamaChat, OllamaGenerate, OllamaShow
from petals_win.engines.base import Engine, GenerationRequest, Loads, ModelCard, find_model

# Of Ollama's own releases the one whose API this is: programs compare it with the oldest that they work with.
_VERSION = "0.13.0"
_TAG = ":latest"
_FOR_EVER = "9999-12-31T23:59:59Z"
_LONGEST_S = 1e9  # beyond it, a time is for ever
_FAMILY = "petals-win"
_CAPABILITIES = ("completion", "tools", "thinking")

_NOT_HERE = {
    "/api/blobs/{digest}": "Models are files or names that petals-win is started with (--model).",
    "/api/copy": "Models have the name that petals-win is started with.",
    "/api/create": "Models are made elsewhere: start petals-win with --model.",
    "/api/delete": "A model goes when petals-win is ended.",
    "/api/pull": "Models are fetched when petals-win is started with --model; /api/tags lists those that are there.",
    "/api/push": "Nothing is published from here.",
}


class OllamaVersion(BaseModel):
    version: str


class OllamaDetails(BaseModel):
    """As Ollama has them; what is not known here is empty."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaListed(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaRunning(OllamaListed):
    expires_at: str
    size_vram: int
    context_length: int


class OllamaTags(BaseModel):
    models: list[OllamaListed]


class OllamaPs(BaseModel):
    models: list[OllamaRunning]


class OllamaShown(BaseModel):
    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str
    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: list[Literal["completion", "tools", "thinking"]]


class _JsonByAnyName(APIRoute):
    """A route whose body is JSON whatever its Content-Type says: that of curl, in the examples that people copy, is a form's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def as_json(http: Request) -> Response:
            kept = [(name, value) for name, value in http.scope["headers"] if name != b"content-type"]
            http.scope["headers"] = [*kept, (b"content-type", b"application/json")]
            return await handle(Request(http.scope, http.receive))

        return as_json


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return reply_schemas.errors(*statuses, body=OllamaError)


def _answers(reply: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of an answer that comes in lines or, if "stream" is false, whole."""
    # Of a stream, OpenAPI 3.2 has the schema of each item.
    content = {"application/x-ndjson": {"itemSchema": {"$ref": f"#/components/schemas/{reply.__name__}"}}}
    described = (
        "The answer, whole or in lines of JSON; the last one has done true, or is an error if the answer breaks."
    )
    answered = {"model": reply, "description": described, "content": content}
    return {200: answered} | _errors(400, 401, 403, 404, 408, 413, 429, 500, 503)


def ollama_routes(engine: Engine, generations: Generations, loads: Loads | None = None) -> APIRouter:
    """Everything below /api that Ollama's clients ask for; `loads` is the engine, if models of it have to be loaded."""
    router = APIRouter(route_class=_JsonByAnyName)

    def keep(card: ModelCard, body: OllamaChat | OllamaGenerate) -> None:
        if loads is not None and body.keep_s is not None:
            loads.keep(card.id, body.keep_s)

    async def only_load(
        http: Request, card: ModelCard, body: OllamaChat | OllamaGenerate, shape: Shape
    ) -> dict[str, Any]:
        """What a request without a prompt is for: to load the model, or by keep_alive 0 to unload it as soon as it is idle."""
        if loads is not None and body.keep_s == 0:
            if card.id in loads.expires():
                keep(card, body)
            return ollama_replies.loaded(shape, body.model, "unload")
        keep(card, body)
        if loads is not None:
            await unless_disconnected(http, loads.load(card.id))
        return ollama_replies.loaded(shape, body.model, "load")

    @router.get("/api/version", response_model=OllamaVersion, responses=_errors(401, 403))
    async def version() -> dict[str, str]:
        """The version of Ollama whose API this is."""
        return {"version": _VERSION}

    @router.get("/api/tags", response_model=OllamaTags, responses=_errors(401, 403, 500))
    async def tags() -> dict[str, Any]:
        """The models that can be asked."""
        return {"models": [_listed(card) for card in engine.models()]}

    @router.get("/api/ps", response_model=OllamaPs, responses=_errors(401, 403, 500))
    async def ps() -> dict[str, Any]:
        """The models that are in memory, and until when they are if nobody asks for them."""
        expires = None if loads is None else loads.expires()
        cards = [card for card in engine.models() if expires is None or card.id in expires]
        return {"models": [_running(card, math.inf if expires is None else expires[card.id]) for card in cards]}

    @router.post("/api/show", response_model=OllamaShown, responses=_errors(400, 401, 403, 404, 408, 413, 500))
    async def show(body: OllamaShow) -> dict[str, Any]:
        """One model, its context and what it can do."""
        return _shown(_find(engine, body.model))

    @router.post("/api/chat", response_model=None, responses=_answers(OllamaChatReply))
    async def chat(http: Request, body: OllamaChat):
        """Answer a conversation, in lines of JSON or with "stream": false whole."""
        card = _find(engine, body.model)
        if not body.messages:
            return await only_load(http, card, body, ChatShape)
        keep(card, body)
        return await _reply(http, generations, body, body.request(card.id), ChatShape)

    @router.post("/api/generate", response_model=None, responses=_answers(OllamaGenerateReply))
    async def generate(http: Request, body: OllamaGenerate):
        """Answer a prompt, in lines of JSON or with "stream": false whole."""
        card = _find(engine, body.model)
        if not body.prompt:
            return await only_load(http, card, body, GenerateShape)
        keep(card, body)
        return await _reply(http, generations, body, body.request(card.id), GenerateShape)

    for path, instead in _NOT_HERE.items():
        router.add_api_route(path, _refusing(instead), methods=["POST", "DELETE", "HEAD"], include_in_schema=False)
    return router


async def _reply(
    http: Request,
    generations: Generations,
    asked: OllamaChat | OllamaGenerate,
    request: GenerationRequest,
    shape: Shape,
) -> dict[str, Any] | Response:
    if not asked.stream:
        return await answer_whole(
            http, generations, [request], lambda answer: ollama_replies.whole(answer, shape, asked.model)
        )
    return await answer_streamed(
        http,
        generations,
        [request],
        lambda answer: ollama_replies.lines(answer, shape, asked.model),
        media_type="application/x-ndjson",
        ping=lambda: ollama_replies.nothing_yet(shape, asked.model),
    )


def _refusing(instead: str) -> Callable[[Request], Coroutine[Any, Any, None]]:
    async def refuse(http: Request) -> None:
        raise ApiError(400, f"{http.url.path} is not supported here. {instead}", code="unsupported")

    return refuse


def _find(engine: Engine, name: str) -> ModelCard:
    """The model that is meant, with or without Ollama's tag. Raises ModelNotFound."""
    return find_model(name.removesuffix(_TAG), engine.models())


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": "",
        "quantization_level": "",
    }


def _listed(card: ModelCard) -> dict[str, Any]:
    name = card.id + _TAG
    return {
        "name": name,
        "model": name,
        "modified_at": ollama_replies.since(card.created),
        "size": 0,  # most of it lies on other PCs
        "digest": hashlib.sha256(card.id.encode()).hexdigest(),  # programs tell models apart by it
        "details": _details(),
    }


def _running(card: ModelCard, left_s: float) -> dict[str, Any]:
    until = _FOR_EVER if left_s > _LONGEST_S else ollama_replies.since(time.time() + left_s)
    return _listed(card) | {"expires_at": until, "size_vram": 0, "context_length": card.context_length}


def _shown(card: ModelCard) -> dict[str, Any]:
    # Programs look for the context under the name of the architecture.
    info = {
        "general.architecture": _FAMILY,
        "general.basename": card.id,
        f"{_FAMILY}.context_length": card.context_length,
    }
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": ollama_replies.since(card.created),
        "details": _details(),
        "model_info": info,
        "capabilities": list(_CAPABILITIES),
    }
