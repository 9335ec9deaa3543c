"""Answers that are held to JSON schemas: whether they are valid, and how fast they come beside free ones.

Knows the engine protocol and JSON Schema. Does not know how answers are held.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema

from petals_win.engines.base import Constraint, Engine, Finished, GenerationRequest, Token, Usage
from petals_win.errors import UserError

Schema = dict[str, Any]
End = Literal["valid", "invalid", "cut off", "refused"]

QUESTION = "Make up an example of JSON that fits this JSON schema. Answer with nothing else.\n"


@dataclass(frozen=True)
class Held:
    """What became of one schema: how its answer ended, its text, or why the schema was refused, and its tokens."""

    number: int
    schema: Schema
    end: End
    text: str
    tokens: int


class Asker:
    """Asks an engine for JSON of schemas, at temperature 1; each number has an answer of its own."""

    def __init__(self, engine: Engine, most: int) -> None:
        """`most`: tokens of an answer."""
        self._engine, self._most = engine, most
        self._model = engine.models()[0].id

    async def ends(self, schemas: Iterable[tuple[int, Schema]], at_once: int) -> AsyncIterator[Held]:
        """What becomes of each schema, by the number that it comes with, as it gets known."""
        waiting = iter(schemas)
        running: set[asyncio.Task[Held]] = set()
        while True:
            while len(running) < at_once and (following := next(waiting, None)) is not None:
                running.add(asyncio.create_task(self.held(*following)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()

    async def speeds(self, schemas: Sequence[tuple[int, Schema]]) -> tuple[list[Held], float, float] | None:
        """Answers to all of these at once, then free ones as long: what became of them, and tokens per second of each kind.

        None if nothing was answered.
        """
        # So that both find prompts computed.
        await asyncio.gather(*(self._answer(number, schema, 1) for number, schema in schemas))
        began = time.perf_counter()
        found = await asyncio.gather(*(self.held(number, schema) for number, schema in schemas))
        between = time.perf_counter()
        free = [(each.number, each.schema, each.tokens) for each in found if each.tokens]
        answers = await asyncio.gather(*(self._answer(*each, ignore_eos=True) for each in free))
        end = time.perf_counter()
        if not free:
            return None
        held_speed = sum(each.tokens for each in found) / (between - began)
        return found, held_speed, sum(tokens for *_, tokens in answers) / (end - between)

    async def held(self, number: int, schema: Schema) -> Held:
        constraint = Constraint("json_schema", json.dumps(schema))
        try:
            text, reason, tokens = await self._answer(number, schema, self._most, constraint=constraint)
        except UserError as e:
            return Held(number, schema, "refused", str(e), 0)
        return Held(number, schema, "cut off" if reason == "length" else _verdict(schema, text), text, tokens)

    async def _answer(self, number: int, schema: Schema, most: int, **more: Any) -> tuple[str, str, int]:
        """Text, reason of the end, and tokens."""
        content = QUESTION + json.dumps(schema, ensure_ascii=False)
        asked: dict[str, Any] = {"messages": ({"role": "user", "content": content},), "temperature": 1.0, **more}
        request = GenerationRequest(model=self._model, seed=number, max_tokens=most, **asked)
        text, reason, tokens = "", "", 0
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                match event:
                    case Token(piece):
                        text += piece
                    case Finished(reason):
                        pass
                    case Usage(_, tokens):
                        pass
        return text, reason, tokens


def _verdict(schema: Schema, text: str) -> End:
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    return "valid"
