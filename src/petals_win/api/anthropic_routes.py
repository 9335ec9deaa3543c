"""Anthropic's Messages API. Knows its routes; what is sent and asked is in the files beside it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from petals_win.api import anthropic_replies, reply_schemas
from petals_win.api.answering import answer_streamed, answer_whole
from petals_win.api.anthropic_replies import AnthropicError, AnthropicMessage, AnthropicTokenCount
from petals_win.api.anthropic_schemas import AnthropicMessages, AnthropicPrompt
from petals_win.api.generations import Generations
from petals_win.engines.base import Engine, find_model

_EVENTS = (
    "Events are named message_start, content_block_start, content_block_delta, content_block_stop, "
    "message_delta, message_stop and ping, or error if the answer breaks; the data of each is JSON."
)
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": AnthropicMessage,
        "description": "The answer, whole or as a stream.",
        "content": reply_schemas.event(_EVENTS),
    }
} | reply_schemas.errors(400, 401, 403, 404, 408, 413, 429, 500, 503, body=AnthropicError)


def anthropic_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What Anthropic's clients ask for. The header anthropic-version may say anything."""
    router = APIRouter()

    @router.post("/v1/messages", response_model=None, responses=_ANSWERS)
    async def messages(http: Request, body: AnthropicMessages):
        """Answer a conversation, whole or with "stream": true as server-sent events."""
        card = find_model(body.model, engine.models())
        request = body.request(card.id)
        if not body.stream:
            return await answer_whole(
                http, generations, [request], lambda answer: anthropic_replies.whole(answer, card.id)
            )
        return await answer_streamed(
            http,
            generations,
            [request],
            lambda answer: anthropic_replies.events(answer, card.id),
            ping=anthropic_replies.ping,
        )

    @router.post(
        "/v1/messages/count_tokens",
        response_model=AnthropicTokenCount,
        responses=reply_schemas.errors(400, 401, 403, 404, 408, 413, 500, 503, body=AnthropicError),
    )
    async def count_tokens(body: AnthropicPrompt) -> dict[str, int]:
        """How many tokens the prompt has that a conversation makes."""
        card = find_model(body.model, engine.models())
        return {"input_tokens": len(await engine.tokenize(body.request(card.id)))}

    return router
