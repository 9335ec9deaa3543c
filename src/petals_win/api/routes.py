"""The routes that answer with JSON: chat, completion, models, health and readiness. Knows the engine protocol only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from petals_win import __version__
from petals_win.api import reply_schemas as sent
from petals_win.api.ascii_json import AsciiJson
from petals_win.api.errors import RETRY_AFTER_S
from petals_win.api.generations import Generations
from petals_win.api.replies import reply
from petals_win.api.schemas import ChatRequest, CompletionRequest
from petals_win.api.shapes import ChatShape, TextShape
from petals_win.engines.base import Engine, ModelCard, find_model

_ANSWER_ERRORS = sent.errors(400, 401, 403, 404, 408, 413, 429, 500, 503, 504)


def open_routes() -> APIRouter:
    """What anybody may ask."""
    router = APIRouter()

    @router.get("/health", response_model=sent.Health, responses=sent.errors(403))
    async def health() -> dict[str, str]:
        """The process is alive. Says nothing about the swarm: that is /ready."""
        return {"status": "ok", "version": __version__}

    return router


def engine_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What needs a key, where keys are set."""
    router = APIRouter()

    @router.get(
        "/ready",
        response_model=sent.Readiness,
        responses=sent.errors(401, 403, 500) | {503: {"model": sent.Readiness, "description": "It could not."}},
    )
    async def ready() -> JSONResponse:
        """Whether anything could answer now (200) or not (503), with engines, workers, and which blocks no node serves."""
        status = engine.status()
        headers = {} if status.ready else {"Retry-After": str(RETRY_AFTER_S)}
        return AsciiJson(asdict(status), 200 if status.ready else 503, headers)

    @router.get("/v1/models", response_model=sent.ModelList, responses=sent.errors(401, 403, 500))
    async def models() -> dict[str, Any]:
        """The names of models that can be asked for; each alias is one of its own."""
        cards = engine.models()
        return {"object": "list", "data": [_card(card, name) for card in cards for name in (card.id, *card.aliases)]}

    @router.get("/v1/models/{model_id:path}", response_model=sent.Model, responses=sent.errors(401, 403, 404, 500))
    async def model(model_id: str) -> dict[str, Any]:
        """One model, by any of its names."""
        card = find_model(model_id, engine.models())
        return _card(card, model_id if model_id in card.aliases else card.id)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses=sent.whole_or_streamed(sent.ChatCompletion, sent.ChatCompletionChunk) | _ANSWER_ERRORS,
    )
    async def chat_completions(http: Request, body: ChatRequest):
        """Answer a conversation, whole or with "stream": true as server-sent events."""
        card = find_model(body.model, engine.models())
        shape = ChatShape(body.logprobs, body.calls_functions)
        return await reply(http, generations, body, body.requests(card.id), shape)

    @router.post(
        "/v1/completions",
        response_model=None,
        responses=sent.whole_or_streamed(sent.TextCompletion, sent.TextCompletionChunk) | _ANSWER_ERRORS,
    )
    async def completions(http: Request, body: CompletionRequest):
        """Continue a text, whole or with "stream": true as server-sent events."""
        card = find_model(body.model, engine.models())
        shape = TextShape(body.logprobs is not None, body.echoed)
        return await reply(http, generations, body, body.requests(card.id), shape)

    return router


def _card(model: ModelCard, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "root": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "petals-win",
        "context_length": model.context_length,
    }
