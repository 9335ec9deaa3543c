"""The route /v1/responses. Knows what it is called; what is asked and sent is in the files beside it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from petals_win.api import reply_schemas as sent
from petals_win.api.answering import answer_streamed, answer_whole
from petals_win.api.generations import Generations
from petals_win.api.responses_replies import ResponseReply, events, whole
from petals_win.api.responses_schemas import ResponsesRequest
from petals_win.engines.base import Engine, find_model

_STREAMED = "JSON; events are from response.created to response.completed, response.incomplete or response.failed."
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ResponseReply,
        "description": "The answer, whole or as a stream.",
        "content": sent.event(_STREAMED),
    }
}


def responses_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What needs a key, where keys are set."""
    router = APIRouter()

    @router.post(
        "/v1/responses",
        response_model=None,
        responses=_ANSWERS | sent.errors(400, 401, 403, 404, 408, 413, 429, 500, 503),
    )
    async def responses(http: Request, body: ResponsesRequest) -> dict[str, Any] | Response:
        """Answer a conversation by OpenAI's newer API. Nothing is stored."""
        model = find_model(body.model, engine.models()).id
        requests = [body.request(model)]
        if body.stream:
            return await answer_streamed(http, generations, requests, lambda answer: events(answer, body, model))
        return await answer_whole(http, generations, requests, lambda answer: whole(answer, body, model))

    return router
