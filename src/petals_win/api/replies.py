"""From an answer in the making to an HTTP response, whole or as server-sent events.

Knows the shape of OpenAI's replies and when to stop computing; not where the events come from.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from petals_win.api.errors import ApiError
from petals_win.api.generations import Answer, Generations
from petals_win.api.schemas import Sampling
from petals_win.engines.base import Finished, GenerationRequest, Token, Usage

# A stream that breaks before its first event can still be answered with a status of its own. Proxies do not wait
# much longer than this for a first byte, so then the stream begins, and pings keep it open.
FIRST_EVENT_S = 10.0
PING_S = 15
# A client that has stopped reading must not hold its place for ever.
SEND_S = 60.0

T = TypeVar("T")


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
    answer = generations.start(requests)
    try:
        if not asked.stream:
            return await _unless_disconnected(http, _whole(answer, asked, shape, requests))
        await _unless_disconnected(http, answer.begun(FIRST_EVENT_S))
    except BaseException:
        await answer.aclose()
        raise
    return _Stream(answer, _events(answer, asked, shape, requests[0].model))


class _Stream(EventSourceResponse):
    """Server-sent events; however the response ends, the answer is given up with it."""

    def __init__(self, answer: Answer, events: AsyncIterator[ServerSentEvent]):
        super().__init__(events, ping=PING_S, ping_message_factory=_ping, send_timeout=SEND_S)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


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
        return _event({**head, "choices": [choice], **counted})

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
        yield _event(error.body())
        return
    if asked.stream_options.include_usage:
        yield _event({**head, "choices": [], "usage": usage.body()})
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


def _event(body: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(body, ensure_ascii=False, separators=(",", ":")), sep="\n")


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


async def _unless_disconnected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but cancel it and raise ClientDisconnect when nobody waits for its result any more."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
