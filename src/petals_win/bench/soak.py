"""Many clients that stream answers from an API for a while: what each of them gets.

Knows OpenAI's completions over HTTP. Does not know what answers them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

_SILENCE_S = 120.0  # without an event, before an answer counts as hanging
_LOOK_S = 0.5
_MOST_PAUSE_S = 10.0  # that a client waits after a 429, whatever Retry-After says


@dataclass
class Soaked:
    """What came: whole answers with their tokens, requests that were refused as they should be, and what is wrong, by kind.

    The longest time in seconds in which an answer that had not come to its end sent nothing, not even a ping; and for how long
    this process stood still at once, because it was stopped or the PC slept: then times are of no use.
    """

    answers: int = 0
    tokens: int = 0
    refused: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    longest_silence_s: float = 0.0
    stood_still_s: float = 0.0


async def soak(url: str, model: str, *, clients: int, seconds: float, tokens: int) -> Soaked:
    """So many clients, each of which asks for answers of `tokens` tokens at most: once, and again until the time is over.

    Who is refused (429) waits as long as Retry-After says.
    """
    found = Soaked()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    timeout = httpx.Timeout(_SILENCE_S, pool=None)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as http:

        async def ask_on(number: int) -> None:
            body = {"model": model, "prompt": f"Client {number} says", "max_tokens": tokens, "seed": number}
            while True:
                try:
                    pause = await _ask(http, url, body, found)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    found.wrong[type(error).__name__] += 1
                    pause = 1.0
                left = end - time.monotonic()
                if left <= 0:
                    return
                await asyncio.sleep(min(pause, left))

        looking = asyncio.create_task(_look_at_the_clock(found))
        try:
            await asyncio.gather(*(ask_on(number) for number in range(clients)))
        finally:
            looking.cancel()
    return found


async def _look_at_the_clock(found: Soaked) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(_LOOK_S)
        found.stood_still_s = max(found.stood_still_s, time.monotonic() - before - _LOOK_S)


async def _ask(http: httpx.AsyncClient, url: str, body: dict[str, Any], found: Soaked) -> float:
    """One answer, counted. Returns how many seconds to wait before the next."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    heard = time.monotonic()
    async with http.stream("POST", f"{url}/v1/completions", json=asked) as response:
        if response.status_code == 429:
            error = json.loads(await response.aread())["error"]
            if not error["message"] or error["code"] != "rate_limit_exceeded":
                found.wrong["429 without a reason"] += 1
            found.refused += 1
            return min(int(response.headers["retry-after"]), _MOST_PAUSE_S)
        if response.status_code != 200:
            found.wrong[f"status {response.status_code}"] += 1
            return 1.0
        reason, counted, done = None, 0, False
        async for line in response.aiter_lines():
            before, heard = heard, time.monotonic()
            found.longest_silence_s = max(found.longest_silence_s, heard - before)
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if done := data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                found.wrong["a stream that breaks"] += 1
                return 1.0
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
            counted = (chunk["usage"] or {}).get("completion_tokens", counted)
    if not done or not counted or reason != "stop" and counted != body["max_tokens"]:
        found.wrong["an answer that is not whole"] += 1
        return 1.0
    found.answers += 1
    found.tokens += counted
    return 0.0
