"""A client of a swarm whose answers are timed.

Knows the engine: how it is started, asked and closed stands in `connected` and `Asker._events` alone. Does not know what
is made of the times.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from petals_win.bench.figures import time_per_token
from petals_win.engines.base import Engine, Event, GenerationRequest, Token, Usage
from petals_win.engines.petals import PetalsEngine
from petals_win.engines.text import TextEngine

logger = logging.getLogger(__name__)

Prompt = Sequence[int]

_STEP_SECONDS = 3600.0  # for anything that is timed; on slow PCs prompts take minutes
_LOOK_SECONDS = 0.005  # between two looks at what has come
_LONGEST_STREAM = 2000  # tokens of an answer that only fills the time beside a prompt


class Asker:
    """Asks greedily for answers of an exact length, by an engine that is running. Made by `connected`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        (card,) = engine.models()
        self._model, self.context_length = card.id, card.context_length

    async def answers(self, prompts: Sequence[Prompt], tokens: int) -> tuple[float, list[str]]:
        """All prompts at once: seconds until the last answer of so many tokens is there, and the texts."""
        async with asyncio.timeout(_STEP_SECONDS):
            begin = time.perf_counter()
            texts = await asyncio.gather(*(self._answer(prompt, tokens) for prompt in prompts))
            return time.perf_counter() - begin, texts

    async def first_token(self, prompt: Prompt) -> float:
        """Seconds until the first token of an answer is there."""
        async with asyncio.timeout(_STEP_SECONDS):
            begin = time.perf_counter()
            async with aclosing(self._events(prompt, 1)) as events:
                await anext(events)
                return time.perf_counter() - begin

    async def beside_a_prompt(self, prompts: Sequence[Prompt], long: Prompt, tokens: int) -> tuple[float, float]:
        """Seconds per token of answers to `prompts`: among themselves, for `tokens` each, then while `long` is read, too."""
        arrivals: list[list[float]] = [[] for _ in prompts]
        streams = [
            asyncio.create_task(self._note(prompt, times)) for prompt, times in zip(prompts, arrivals, strict=True)
        ]

        async def until(count: int, since: float) -> float:
            """Until each answer has so many tokens since then, or has ended."""
            while True:
                for stream in streams:
                    if stream.done():
                        stream.result()  # its error, if it has failed
                counts = [sum(at >= since for at in times) for times in arrivals]
                if all(got >= count or s.done() for got, s in zip(counts, streams, strict=True)):
                    return time.perf_counter()
                await asyncio.sleep(_LOOK_SECONDS)

        try:
            async with asyncio.timeout(_STEP_SECONDS):
                begin = await until(1, 0.0)
                middle = await until(tokens, begin)
                await self.first_token(long)
                end = time.perf_counter()
                await until(1, end)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        alone = [time_per_token(times, begin, middle) for times in arrivals]
        beside = [time_per_token(times, middle, end) for times in arrivals]
        return statistics.mean(alone), statistics.mean(beside)

    async def _answer(self, prompt: Prompt, tokens: int) -> str:
        text, generated = "", 0
        async with aclosing(self._events(prompt, tokens)) as events:
            async for event in events:
                if isinstance(event, Token):
                    text += event.text
                elif isinstance(event, Usage):
                    generated = event.completion_tokens
        if generated != tokens:
            raise RuntimeError(f"An answer of {tokens} tokens was asked for, and {generated} came")
        return text

    async def _note(self, prompt: Prompt, arrivals: list[float]) -> None:
        async with aclosing(self._events(prompt, min(_LONGEST_STREAM, self.context_length - len(prompt)))) as events:
            async for event in events:
                if isinstance(event, Token):
                    arrivals.append(time.perf_counter())

    def _events(self, prompt: Prompt, tokens: int) -> AsyncGenerator[Event, None]:
        request = GenerationRequest(
            model=self._model,
            prompt=tuple(prompt),
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            temperature=0.0,
        )
        return self._engine.generate(request)


@asynccontextmanager
async def connected(model: str, peers: Sequence[str]) -> AsyncIterator[Asker]:
    """A client of the swarm of `peers`. Raises UserError if it cannot join."""
    engine = TextEngine(await asyncio.to_thread(PetalsEngine.connect, model, peers))
    try:
        await engine.start(lambda why: logger.warning("%s", why))  # whoever asks is told by an error
        yield Asker(engine)
    finally:
        await engine.close()
