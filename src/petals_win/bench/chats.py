"""Chats by HTTP, many at once and many in a row, and what became of each.

Knows OpenAI's chat completions. Does not know what answers them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Chat:
    """One question and its end: `reason` is "stop" or "length", or "error", of which `error` tells more."""

    reason: str
    prompt_tokens: int = 0
    tokens: int = 0  # of the answer
    error: str = ""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.tokens

    def is_whole(self, context: int, most: int | None = None) -> bool:
        """Whether it ended by itself, after the `most` tokens that were asked for, or where the context ends."""
        if self.reason == "length":
            return self.tokens == most or self.length == context
        return self.reason == "stop"


class Chats:
    """Asks one model of the API at `url`. A context; `seconds` bound the wait for each answer."""

    def __init__(self, url: str, seconds: float) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(seconds), limits=limits, trust_env=False)
        self._model = ""
        self.context = 0  # tokens, as the API offers them

    async def __aenter__(self) -> Chats:
        (card,) = (await self._http.get("/v1/models")).raise_for_status().json()["data"]
        self._model, self.context = card["id"], card["context_length"]
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._http.aclose()

    async def ask(self, text: str, **settings: Any) -> Chat:
        """One answer, without a limit unless `settings` have one."""
        body = {"model": self._model, "messages": [{"role": "user", "content": text}], **settings}
        try:
            response = await self._http.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                return Chat("error", error=f"status {response.status_code}: {response.text[:500]}")
            answer = response.json()
            (choice,), usage = answer["choices"], answer["usage"]
            return Chat(choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])
        except (httpx.HTTPError, KeyError, ValueError) as e:
            return Chat("error", error=f"{type(e).__name__}: {e}")

    async def at_once(self, texts: Iterable[str], **settings: Any) -> tuple[list[Chat], float]:
        """All of them together, each drawn by a seed of its own; and seconds until the last one is there."""
        began = time.perf_counter()
        asked = [self.ask(text, seed=seed, **settings) for seed, text in enumerate(texts)]
        return list(await asyncio.gather(*asked)), time.perf_counter() - began

    async def in_a_row(self, texts: Iterable[str], after_each: Callable[[], None], **settings: Any) -> list[Chat]:
        """One after the other."""
        chats: list[Chat] = []
        for text in texts:
            chats.append(await self.ask(text, **settings))
            after_each()
        return chats
