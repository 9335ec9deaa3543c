"""How much a worker has to do, and how fast it is. Knows counts and times; not what is computed.

Engines compute answers together, so that each is slower beside others, but less than by their number. What is measured is put
down to an answer that runs alone, by the square root of how many ran, so that workers compare whatever their load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

_WEIGHT = 0.2  # of the newest answer in a moving average
_LEAST_TOKENS = 4  # fewer tell nothing about speed
_LEAST_PROMPT = 16


def beside(running: float) -> float:
    """How many times as long an answer takes beside others, `running` of them with itself."""
    return max(running, 1.0) ** 0.5


class Load:
    """Places for answers, who has one and who waits, and moving averages of how fast they were."""

    def __init__(self, slots: int):
        self.slots = slots
        self.running = self.waiting = 0
        self._answer_seconds, self._counted = 0.0, time.monotonic()  # of all that ran up to then
        self.tokens_per_s: float | None = None
        self.prompt_tokens_per_s: float | None = None
        self._places = asyncio.Semaphore(slots)

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[Timed, None]:
        """One of the places for the length of a with block; waits for it in line."""
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.answer_seconds()
        self.running += 1
        timed = Timed(self)
        try:
            yield timed
        finally:
            self.answer_seconds()
            self.running -= 1
            self._places.release()

    def answer_seconds(self) -> float:
        """The seconds that all answers have run so far, together; over those of a clock they are how many ran, in the mean."""
        now = time.monotonic()
        self._answer_seconds += self.running * (now - self._counted)
        self._counted = now
        return self._answer_seconds


class Timed:
    """The times of one answer."""

    def __init__(self, load: Load):
        self._load, self._began, self._first = load, time.monotonic(), 0.0
        self._before, self._at_first = load.answer_seconds(), 0.0

    def came(self) -> None:
        """A piece of the answer came."""
        if not self._first:
            self._first, self._at_first = time.monotonic(), self._load.answer_seconds()

    def complete(self, prompt_tokens: int, tokens: int) -> None:
        """:param prompt_tokens: of the prompt, those that were computed"""
        if not self._first:
            return
        load, took, waited = self._load, time.monotonic() - self._first, self._first - self._began
        if tokens > _LEAST_TOKENS and took > 0:
            ran = (load.answer_seconds() - self._at_first) / took
            load.tokens_per_s = _average(load.tokens_per_s, (tokens - 1) / took * beside(ran))
        if prompt_tokens >= _LEAST_PROMPT and waited > 0:
            ran = (self._at_first - self._before) / waited
            load.prompt_tokens_per_s = _average(load.prompt_tokens_per_s, prompt_tokens / waited * beside(ran))


def _average(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
