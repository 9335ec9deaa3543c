"""The engine "command" in the dialect "cli": a program is started for each question, and what it writes is the answer.

Knows requests and how many programs run. Does not know processes, nor what the program computes with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

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
from petals_win.engines.command_arguments import filled, takes_prompt
from petals_win.engines.command_file import Described
from petals_win.engines.command_prompts import GuessingReader, Reader, TokenizerReader
from petals_win.engines.command_run import Run
from petals_win.engines.outside import Places, options_for
from petals_win.engines.stopping import StopStrings
from petals_win.errors import UserError


class CliEngine:
    """An Engine whose answers are what programs write, each in a run of its own. Raises UserError if there is no such program."""

    def __init__(self, described: Described):
        self._described = described
        self._argv = described.argv()
        self._models = {model.name: model for model in described.models}
        self._readers: dict[str, Reader] = {}
        for model in described.models:
            assert model.context_length is not None
            if model.tokenizer is None:
                self._readers[model.name] = GuessingReader(model.name, model.context_length)
            else:
                folder = str(described.home / model.tokenizer)
                self._readers[model.name] = TokenizerReader(model.name, model.context_length, folder)
        limits = described.limits
        self._places = Places(described.named.capitalize(), limits.at_once or 1, limits.waiting_seconds)
        self._created = int(time.time())
        self._runs: set[Run] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def running(self) -> int:
        """Answers that programs work on."""
        return len(self._runs) + self._places.taken

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """It is never lost: the next run may go well."""

    def models(self) -> list[ModelCard]:
        return [ModelCard(name, self._created, reader.context) for name, reader in self._readers.items()]

    def status(self) -> SwarmStatus:
        if self._closed:
            return SwarmStatus(False, "petals-win is ending.")
        return SwarmStatus(True, f"{self._described.named.capitalize()} is started for each question.")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        reader = self._reader(request.model)
        options = self._options(request)
        text, prompt_tokens = reader.read(request)
        limit = reader.limit(request.max_tokens, prompt_tokens)
        if limit is not None and "max_tokens" in self._described.options:
            options["max_tokens"] = limit
        stops, said = StopStrings(request.stop), ""
        async with contextlib.aclosing(self._pieces(request.model, text, options)) as pieces:
            async for piece in pieces:
                said += piece
                if shown := stops.feed(piece):
                    yield Token(shown)
                if stops.stopped:
                    break
        if rest := stops.flush():
            yield Token(rest)
        count = reader.count(said)
        at_limit = reader.exact and limit is not None and count >= limit
        yield Finished("length" if at_limit and not stops.stopped else "stop", stops.met)
        yield Usage(prompt_tokens, count)

    def _options(self, request: GenerationRequest) -> dict[str, Any]:
        """Of what a request asks for, that which becomes arguments. Raises UserError that names what does not."""
        if isinstance(request.prompt, tuple):
            raise UserError(f"{request.model} takes text, and no token ids.")
        if request.count_along:
            raise UserError(f"continuous_usage_stats: {request.model} cannot do that. Leave it out.")
        can, ignored = self._described.options, self._described.ignore
        if request.max_tokens is not None and "max_tokens" not in {*can, *ignored}:
            raise UserError(f"max_tokens: {request.model} cannot do that. Leave it out.")
        by_template = {"chat_template_kwargs", "continue_final_message", "add_generation_prompt"}
        if self._models[request.model].tokenizer is None:
            by_template = set()
        options = options_for(request.model, request, {*can, *by_template}, ignored)
        return {name: value for name, value in options.items() if name not in by_template}

    async def _pieces(self, name: str, prompt: str, options: dict[str, Any]) -> AsyncGenerator[str, None]:
        described, argv = self._described, self._argv
        settings = {**self._models[name].settings, "model": name}
        argv = [argv[0], *filled(described.arguments, described.options, options, settings, prompt)]
        async with self._places.one():
            if self._closed:
                raise EngineClosed()
            run = Run(described, argv, None if takes_prompt(described.arguments) else prompt)
            self._runs.add(run)
            try:
                async with contextlib.aclosing(run.pieces()) as pieces:
                    async for piece in pieces:
                        yield piece
            except Exception as e:
                if self._closed:
                    raise EngineClosed() from e
                raise
            finally:
                # In a task of its own: whoever leaves may be cancelled once more while the program ends.
                await asyncio.shield(_keep(self._end(run), self._leaving))

    async def _end(self, run: Run) -> None:
        await run.end()
        self._runs.discard(run)

    def _reader(self, model: str) -> Reader:
        if self._closed:
            raise EngineClosed()
        if model not in self._readers:
            raise ModelNotFound(model, list(self._readers))
        return self._readers[model]

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        self._reader(request.model)
        raise UserError(f"{request.model} is computed by a program that tells no token ids.")

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        self._reader(model)
        raise UserError(f"{model} is computed by a program that tells no token ids.")

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        self._reader(model)
        raise UserError(f"{model} is computed by a program that makes no embeddings.")

    async def close(self) -> None:
        self._closed = True
        for run in self._runs:
            run.break_off(EngineClosed())
        await asyncio.gather(*(run.end() for run in tuple(self._runs)))


def _keep(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
