"""The routes that answer with JSON: chat, completion, models, health and readiness. Knows the engine protocol only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from petals_win import __version__
from petals_win.api.errors import RETRY_AFTER_S
from petals_win.api.generations import Generations
from petals_win.api.replies import ChatShape, TextShape, reply
from petals_win.api.schemas import ChatRequest, CompletionRequest
from petals_win.engines.base import Engine, ModelCard, ModelNotFound


def open_routes() -> APIRouter:
    """What anybody may ask."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive. Says nothing about the swarm: that is /ready."""
        return {"status": "ok", "version": __version__}

    return router


def engine_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What needs a key, where keys are set."""
    router = APIRouter()

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether the swarm could answer now (200) or not (503), which blocks no node serves, and who serves what."""
        status = engine.status()
        headers = {} if status.ready else {"Retry-After": str(RETRY_AFTER_S)}
        return JSONResponse(asdict(status), 200 if status.ready else 503, headers)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [_card(model) for model in engine.models()]}

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        """One model."""
        known = engine.models()
        for card in known:
            if card.id == model_id:
                return _card(card)
        raise ModelNotFound(model_id, [card.id for card in known])

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(http: Request, body: ChatRequest):
        """Answer a conversation, whole or with "stream": true as server-sent events."""
        return await reply(http, generations, body, body.requests(), ChatShape)

    @router.post("/v1/completions", response_model=None)
    async def completions(http: Request, body: CompletionRequest):
        """Continue a text, whole or with "stream": true as server-sent events."""
        return await reply(http, generations, body, body.requests(), TextShape)

    return router


def _card(model: ModelCard) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "petals-win",
        "context_length": model.context_length,
    }
