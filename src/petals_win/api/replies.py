"""The replies of OpenAI's API, whole or in chunks. Knows their shape; not where the events of an answer come from."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from petals_win.api.answering import answer_streamed, answer_whole, json_event
from petals_win.api.errors import ApiError
from petals_win.api.generations import Answer, Generations
from petals_win.api.schemas import Sampling
from petals_win.engines.base import Finished, GenerationRequest, Token, Usage


class ChatShape:
    """Replies of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    opening: dict[str, Any] | None = {"delta": {"role": "assistant", "content": ""}}
    closing: dict[str, Any] = {"delta": {}}

    @staticmethod
    def piece(text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class TextShape:
    """Replies of /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    opening: dict[str, Any] | None = None
    closing: dict[str, Any] = {"text": ""}

    @staticmethod
    def piece(text: str) -> dict[str, Any]:
        return {"text": text}

    whole = piece


Shape = type[ChatShape] | type[TextShape]


async def reply(
    http: Request, generations: Generations, asked: Sampling, requests: list[GenerationRequest], shape: Shape
) -> dict[str, Any] | Response:
    """Answer the requests, of which there is at least one, in the way that was asked for.

    Raises ApiError, ClientDisconnect.
    """
    if asked.stream:
        return await answer_streamed(
            http, generations, requests, lambda answer: _events(answer, asked, shape, requests[0].model)
        )
    return await answer_whole(http, generations, requests, lambda answer: _whole(answer, asked, shape, requests))


async def _whole(answer: Answer, asked: Sampling, shape: Shape, requests: list[GenerationRequest]) -> dict[str, Any]:
    texts = [""] * len(requests)
    reasons: list[str | None] = [None] * len(requests)
    usage = _Usage()
    async for index, event in answer:
        match event:
            case Token(text):
                texts[index] += text
            case Finished(reason):
                reasons[index] = reason
            case Usage():
                usage.add(index, event, asked.n)
    choices = [
        {"index": index, **shape.whole(text), "logprobs": None, "finish_reason": reason}
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return {**_head(shape, shape.whole_object, requests[0].model), "choices": choices, "usage": usage.body()}


async def _events(answer: Answer, asked: Sampling, shape: Shape, model: str) -> AsyncIterator[ServerSentEvent]:
    head = _head(shape, shape.chunk_object, model)
    counted: dict[str, Any] = {"usage": None} if asked.stream_options.include_usage else {}

    def chunk(index: int, piece: dict[str, Any], reason: str | None = None) -> ServerSentEvent:
        choice = {"index": index, **piece, "logprobs": None, "finish_reason": reason}
        return json_event({**head, "choices": [choice], **counted})

    usage = _Usage()
    opened = -1
    try:
        async for index, event in answer:
            if index > opened and shape.opening:
                yield chunk(index, shape.opening)
                opened = index
            match event:
                case Token(text):
                    yield chunk(index, shape.piece(text))
                case Finished(reason):
                    yield chunk(index, shape.closing, reason)
                case Usage():
                    usage.add(index, event, asked.n)
    except ApiError as error:
        yield json_event(error.body())
        return
    if asked.stream_options.include_usage:
        yield json_event({**head, "choices": [], "usage": usage.body()})
    yield ServerSentEvent("[DONE]", sep="\n")


class _Usage:
    """Adds up tokens; a prompt that is answered several times counts once."""

    def __init__(self) -> None:
        self._prompt = 0
        self._completion = 0
        self._cached = 0

    def add(self, index: int, usage: Usage, choices_per_prompt: int) -> None:
        self._prompt += usage.prompt_tokens if index % choices_per_prompt == 0 else 0
        self._cached += usage.cached_tokens if index % choices_per_prompt == 0 else 0
        self._completion += usage.completion_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


def _head(shape: Shape, kind: str, model: str) -> dict[str, Any]:
    """`model` is its name in /v1/models, however it was asked for: what front-ends know it by."""
    return {
        "id": shape.id_prefix + uuid.uuid4().hex,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
