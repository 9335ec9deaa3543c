"""Answers of the default model that are held to JSON schemas by chance: how many are valid, and what it costs.

Run by scripts/schemas, in .venv. Each answer at temperature 1 is followed by a free one to the same question with as many tokens, in
the engine "local" of this process, so that what else the PC does meets both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import jsonschema

from petals_win.bench.random_schemas import random_schemas
from petals_win.engines.base import Constraint, Engine, Finished, GenerationRequest, Token, Usage
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.errors import UserError
from petals_win.models.source import DEFAULT_MODEL

QUESTION = "Make up an example of JSON that fits this JSON schema. Answer with nothing else.\n"


# Of a schema: refused by name, or its answer is cut off by its length, or ended by itself.
ENDS = ("valid", "invalid", "cut off", "refused")


async def answer(engine: Engine, asked: GenerationRequest) -> tuple[str, str, int, float]:
    """Text, reason of the end, tokens, and seconds of all of it."""
    began, text, reason, tokens = time.perf_counter(), "", "", 0
    async for event in engine.generate(asked):
        match event:
            case Token(piece):
                text += piece
            case Finished(reason):
                pass
            case Usage(_, tokens):
                pass
    return text, reason, tokens, time.perf_counter() - began


def verdict(schema: dict[str, Any], text: str, reason: str) -> str:
    if reason == "length":
        return "cut off"
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    return "valid"


async def measure(count: int, seed: int, most: int, seconds: float) -> dict[str, Any]:
    engine = await asyncio.to_thread(find_engine("local"), EngineSettings(DEFAULT_MODEL))
    await engine.start(lambda why: sys.exit(str(why)))
    ends, tokens, held_s, free_s = Counter[str](), 0, 0.0, 0.0
    began = time.perf_counter()
    model = engine.models()[0].id
    try:
        for number, schema in enumerate(random_schemas(count, seed)):
            if time.perf_counter() - began > seconds and number > 1:
                break
            messages = ({"role": "user", "content": QUESTION + json.dumps(schema, ensure_ascii=False)},)
            asked: dict[str, Any] = {"model": model, "messages": messages, "temperature": 1.0, "seed": number}
            constraint = Constraint("json_schema", json.dumps(schema))
            # So that both find the prompt computed.
            await answer(engine, GenerationRequest(**asked, max_tokens=1))
            try:
                text, reason, n, took = await answer(
                    engine, GenerationRequest(**asked, constraint=constraint, max_tokens=most)
                )
            except UserError as e:
                ends["refused"] += 1
                print(f"{number}: refused. {e}", file=sys.stderr, flush=True)
                continue
            *_, m, free_took = await answer(engine, GenerationRequest(**asked, max_tokens=n, ignore_eos=True))
            ends[found := verdict(schema, text, reason)] += 1
            print(f"{number}: {found}, {n} tokens, {n / took:.1f} and {m / free_took:.1f} tokens/s", file=sys.stderr)
            if found == "invalid":
                print(f"{json.dumps(schema)}\n{text}", file=sys.stderr)
            if number:
                tokens, held_s, free_s = tokens + n, held_s + took, free_s + free_took
    finally:
        await engine.close()
    speeds = {"tokens_per_s": tokens / held_s, "free_tokens_per_s": tokens / free_s, "ratio": free_s / held_s}
    asked = ends.total()
    shares = {f"{end.replace(' ', '_')}_share": round(ends[end] / asked, 3) for end in ENDS}
    return {"schemas": asked, **shares, "tokens": tokens, **{name: round(value, 3) for name, value in speeds.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/schemas", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="schemas, at least 2 (default: 200)")
    parser.add_argument("--seed", type=int, default=14, help="of the schemas (default: 14)")
    parser.add_argument("--tokens", type=int, default=400, help="of an answer at most (default: 400)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no schema after so long")
    asked = parser.parse_args()
    print(json.dumps(asyncio.run(measure(max(2, asked.count), asked.seed, asked.tokens, asked.seconds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
