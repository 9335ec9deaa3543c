"""The replies of OpenAI's API, whole or in chunks. Knows their frame and usage; not what a choice looks like."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from petals_win.api.answering import answer_streamed, answer_whole
from petals_win.api.errors import ApiError
from petals_win.api.generations import Answer, Generations
from petals_win.api.schemas import Sampling
from petals_win.api.shapes import Shape
from petals_win.api.streaming import DONE, json_event
from petals_win.engines.base import Event, Finished, GenerationRequest, Usage


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
    events: list[list[Event]] = [[] for _ in requests]
    reasons: list[str | None] = [None] * len(requests)
    usage = _Usage(asked.n)
    async for index, event in answer:
        match event:
            case Finished():
                reasons[index] = shape.reason(event.reason)
            case Usage():
                usage.counts[index] = event
            case _:
                events[index].append(event)
    choices = [
        {"index": index, **shape.whole(index, events[index]), "finish_reason": reason}
        for index, reason in enumerate(reasons)
    ]
    return {**_head(shape, shape.whole_object, requests[0].model), "choices": choices, "usage": usage.body()}


async def _events(answer: Answer, asked: Sampling, shape: Shape, model: str) -> AsyncGenerator[bytes, None]:
    head = _head(shape, shape.chunk_object, model)
    options = asked.stream_options
    usage = _Usage(asked.n)

    def chunk(index: int, piece: dict[str, Any], reason: str | None = None) -> bytes:
        body = {**head, "choices": [{"index": index, **piece, "finish_reason": reason}]}
        if options.continuous_usage_stats:
            body["usage"] = usage.body()
        elif options.include_usage:
            body["usage"] = None
        return json_event(body)

    opened, reason = -1, None
    try:
        async for index, event in answer:
            if isinstance(event, Usage):
                usage.counts[index] = event
                if reason is not None:
                    yield chunk(index, shape.closing(), reason)
                    reason = None
                continue
            if index > opened and (opening := shape.opening(index, event)):
                yield chunk(index, opening)
            opened = index
            if isinstance(event, Finished):
                reason = shape.reason(event.reason)  # told with the last count, which comes next
            elif (piece := shape.piece(index, event)) is not None:
                yield chunk(index, piece)
    except ApiError as error:
        yield json_event(error.body())
        return
    if options.include_usage:
        yield json_event({**head, "choices": [], "usage": usage.body()})
    yield DONE


class _Usage:
    """What was counted for each choice, and the sums; a prompt that is answered several times counts once."""

    def __init__(self, choices_per_prompt: int) -> None:
        self._choices_per_prompt = choices_per_prompt
        self.counts: dict[int, Usage] = {}

    def body(self) -> dict[str, Any]:
        of_prompts = [count for index, count in self.counts.items() if index % self._choices_per_prompt == 0]
        prompt = sum(count.prompt_tokens for count in of_prompts)
        completion = sum(count.completion_tokens for count in self.counts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(count.cached_tokens for count in of_prompts)},
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
