"""What HTTP adds to an engine: the same answers streamed by its API and driven from Python, in turns.

Knows the API's server and OpenAI's completions. The client of the API is a process of its own, as clients are.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from petals_win.api.app import create_app
from petals_win.api.server import ApiServer
from petals_win.api.settings import Settings
from petals_win.bench.figures import Rounds
from petals_win.engines.base import Engine, GenerationRequest, Token, Usage

_ANSWER_SECONDS = 600.0

# Asks for each line of its input, keeps its connection, and tells the seconds to the first token, those to the end, and the tokens.
_CLIENT = """
import http.client, json, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for body in sys.stdin:
    began, first, tokens = time.perf_counter(), None, 0
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    print(json.dumps([first, time.perf_counter() - began, tokens]), flush=True)
"""


@dataclass(frozen=True)
class Timed:
    """One answer: seconds to its first token and to its end, and its tokens."""

    first_s: float
    whole_s: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.whole_s


async def measure(engine: Engine, prompt: str, kinds: Sequence[tuple[int, int]]) -> list[Rounds]:
    """Greedy answers by HTTP and by Python in turns: tokens_per_s and first_s of each by round.

    `kinds` says how many tokens an answer has, and how many rounds of such answers there are; each has its Rounds in the result. The
    engine is running, and is closed at the end.
    """
    async with _served(engine) as port, _client(port) as by_http:
        return [await _in_turns(engine, by_http, prompt, tokens, rounds) for tokens, rounds in kinds]


async def _in_turns(
    engine: Engine, by_http: Callable[[dict[str, Any]], Awaitable[Timed]], prompt: str, tokens: int, rounds: int
) -> Rounds:
    found = Rounds()
    asked: dict[str, Any] = {"model": engine.models()[0].id, "prompt": prompt}
    exact: dict[str, Any] = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    request = GenerationRequest(**asked, **exact)
    body = {**asked, **exact, "stream": True, "stream_options": {"include_usage": True}}
    for number in range(rounds + 1):
        # Each is first in every second round.
        for over_http in (True, False) if number % 2 else (False, True):
            timed = await (by_http(body) if over_http else _from_python(engine, request))
            if timed.tokens != tokens:
                raise RuntimeError(f"An answer of {tokens} tokens was asked for, and {timed.tokens} came")
            if number:  # the one before all others pays for what is made once
                side = "http" if over_http else "python"
                found.add(f"{side}_tokens_per_s", timed.tokens_per_s)
                found.add(f"{side}_first_s", timed.first_s)
    return found


async def _from_python(engine: Engine, request: GenerationRequest) -> Timed:
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                first = first or time.perf_counter() - began
            elif isinstance(event, Usage):
                tokens = event.completion_tokens
    return Timed(first, time.perf_counter() - began, tokens)


@asynccontextmanager
async def _served(engine: Engine) -> AsyncIterator[int]:
    """The engine's API on a free port; closes the engine."""
    settings = Settings(port=0)
    server, ready = ApiServer(settings), asyncio.Event()
    serving = asyncio.create_task(server.serve(create_app(engine, settings=settings), ready.set))
    try:
        await ready.wait()
        yield server.port
    finally:
        server.stop()
        await serving


@asynccontextmanager
async def _client(port: int) -> AsyncIterator[Any]:
    """A function that asks by HTTP, from a process that ends with the block."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _CLIENT, str(port), stdin=pipe, stdout=pipe)
    assert process.stdin is not None and process.stdout is not None
    sent, said = process.stdin, process.stdout

    async def ask(body: dict[str, Any]) -> Timed:
        sent.write(json.dumps(body).encode() + b"\n")
        line = await asyncio.wait_for(said.readline(), _ANSWER_SECONDS)
        if not line:
            raise RuntimeError("The client of the API has ended")
        return Timed(*json.loads(line))

    try:
        yield ask
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
