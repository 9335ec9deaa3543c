"""An engine without a model whose tokens come at a steady pace, each with the time of its making: what carries them can be timed by it.

Knows the engine protocol. Does not know who asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from petals_win.engines.base import (
    EngineClosed,
    Event,
    Finished,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    SwarmStatus,
    Token,
    Usage,
)
from petals_win.errors import UserError

MODEL = "steady"
_CONTEXT = 1_000_000


class SteadyEngine:
    """A token every `pace_s` seconds. Its text is a number of nanoseconds by the clock that all processes of a PC share, and a blank."""

    def __init__(self, pace_s: float):
        self._pace_s = pace_s
        self._closed = False

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """It is never lost."""

    def models(self) -> list[ModelCard]:
        return [ModelCard(MODEL, int(time.time()), _CONTEXT)]

    def status(self) -> SwarmStatus:
        return SwarmStatus(not self._closed, "It answers at a steady pace.")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if request.model != MODEL:
            raise ModelNotFound(request.model, [MODEL])
        tokens = request.max_tokens or 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in range(1, tokens + 1):
            await asyncio.sleep(max(0.0, began + number * self._pace_s - loop.time()))
            if self._closed:
                raise EngineClosed()
            yield Token(f"{now_ns()} ")
        yield Finished("length")
        yield Usage(1, tokens)

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        raise UserError("It has no tokens.")

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        raise UserError("It has no tokens.")

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        raise UserError("It has no embeddings.")

    async def close(self) -> None:
        self._closed = True


def now_ns() -> int:
    """By the clock that all processes of a PC share."""
    return time.perf_counter_ns()
