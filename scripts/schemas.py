"""Answers of the default model that are held to JSON schemas by chance: how many are valid, and what it costs.

Run by scripts/schemas, in .venv, on the engine "local" of this process. Some schemas are answered one by one and in groups, each
group with a schema and then free with as many tokens; ratios of speeds are made within groups. The others are answered at once.
The exit code is 1 if an answer that ended by itself is invalid, more were cut off or refused than should be, or it costs too much.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from petals_win.bench.figures import Rounds
from petals_win.bench.held import Asker, Held, Schema
from petals_win.bench.random_schemas import random_schemas
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.models.source import DEFAULT_MODEL

ENDS = ("valid", "invalid", "cut off", "refused")
MOST_CUT_OFF, MOST_REFUSED, LEAST_RATIO = 0.05, 0.1, 0.9


class Found:
    """What is known so far; each answer is a line of the standard error output."""

    def __init__(self) -> None:
        self.ends, self.rounds, self.tokens = Counter[str](), Rounds(), 0

    def count(self, held: Held) -> None:
        self.ends[held.end] += 1
        self.tokens += held.tokens
        so_far = ", ".join(f"{self.ends[end]} {end}" for end in ENDS)
        print(f"{held.number}: {held.end}, {held.tokens} tokens. {so_far}", file=sys.stderr, flush=True)
        if held.end != "valid":
            print(f"   {json.dumps(held.schema)}\n   {held.text[-500:]}", file=sys.stderr, flush=True)

    def figures(self) -> dict[str, Any]:
        asked = max(1, self.ends.total())
        shares = {f"{end.replace(' ', '_')}_share": round(self.ends[end] / asked, 3) for end in ENDS}
        values = self.rounds.values
        sizes = sorted({int(name.rpartition("_")[2]) for name in values})
        speeds = {name: round(self.rounds.median(name), 2) for name in values}
        ratios = {f"ratio_{size}": round(self.rounds.ratio(f"held_{size}", f"free_{size}"), 3) for size in sizes}
        return {"schemas": self.ends.total(), **shares, "tokens": self.tokens, **speeds, **ratios}


async def measure(asked: argparse.Namespace, found: Found) -> None:
    engine = await asyncio.to_thread(find_engine("local"), EngineSettings(DEFAULT_MODEL))
    await engine.start(lambda why: sys.exit(str(why)))
    asker = Asker(engine, asked.tokens)
    schemas: Iterator[tuple[int, Schema]] = enumerate(random_schemas(asked.count, asked.seed))
    schemas = itertools.islice(schemas, asked.skip, None)
    try:
        for size in [each for each in (1, asked.at_once) for _ in range(asked.groups)]:
            group = list(itertools.islice(schemas, size))
            if not group or (timed := await asker.speeds(group)) is None:
                continue
            answers, held, free = timed
            found.rounds.add(f"held_{size}", held)
            found.rounds.add(f"free_{size}", free)
            print(f"{size} at once: {held:.1f} tokens/s, free {free:.1f}", file=sys.stderr, flush=True)
            for each in answers:
                found.count(each)
        async for each in asker.ends(schemas, asked.at_once):
            found.count(each)
    finally:
        await engine.close()


async def within(seconds: float, asked: argparse.Namespace, found: Found) -> None:
    try:
        async with asyncio.timeout(seconds):
            await measure(asked, found)
    except TimeoutError:
        print(f"{seconds:.0f} s are over", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/schemas", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="schemas (default: 200)")
    parser.add_argument("--skip", type=int, default=0, help="so many of these, which were asked before")
    parser.add_argument("--seed", type=int, default=14, help="of the schemas (default: 14)")
    parser.add_argument("--tokens", type=int, default=2048, help="of an answer at most (default: 2048)")
    parser.add_argument("--at-once", type=int, default=8, help="answers (default: 8)")
    parser.add_argument(
        "--groups", type=int, default=7, help="of one answer and of several that are timed (default: 7)"
    )
    parser.add_argument("--seconds", type=float, default=None, help="end after so long with what is known")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    found = Found()
    asyncio.run(within(asked.seconds, asked, found))
    figures = found.figures()
    if asked.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):28}{value}")
    ratios = [value for name, value in figures.items() if name.startswith("ratio")]
    missed = [
        *(["an answer is invalid"] if found.ends["invalid"] else []),
        *(["too many are cut off"] if figures["cut_off_share"] > MOST_CUT_OFF else []),
        *(["too many are refused"] if figures["refused_share"] > MOST_REFUSED else []),
        *(["a schema costs too much time"] if min(ratios, default=1.0) < LEAST_RATIO else []),
    ]
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if missed or not found.ends else 0


if __name__ == "__main__":
    sys.exit(main())
