"""What HTTP costs: tokens per second and the time to the first token of the default model, streamed by its API and driven from Python.

Run by scripts/overhead, in .venv. Both take turns on the engine "local" of one process; ratios and differences are made within
rounds. The first token is timed by many short answers of their own, since the difference is a small part of what is timed. The
exit code is 1 if HTTP costs more than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from typing import Any

from petals_win.bench.http import measure
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.host.threads import apply_thread_settings
from petals_win.models.source import DEFAULT_MODEL

LEAST_RATIO, MOST_FIRST_MS = 0.97, 10.0
SHORT = 3  # tokens
PROMPT = "The history of computing began with"


async def figures(rounds: int, firsts: int, tokens: int) -> dict[str, Any]:
    engine = await asyncio.to_thread(find_engine("local"), EngineSettings(DEFAULT_MODEL))
    await engine.start(lambda why: sys.exit(str(why)))
    found, short = await measure(engine, PROMPT, [(tokens, rounds), (SHORT, firsts)])
    pairs = zip(short.values["http_first_s"], short.values["python_first_s"], strict=True)
    return {
        "rounds": rounds,
        "tokens": tokens,
        "http_tokens_per_s": found.median("http_tokens_per_s"),
        "python_tokens_per_s": found.median("python_tokens_per_s"),
        "ratio": found.ratio("http_tokens_per_s", "python_tokens_per_s"),
        "http_first_ms": 1000 * short.median("http_first_s"),
        "python_first_ms": 1000 * short.median("python_first_s"),
        "first_token_more_ms": 1000 * statistics.median(by_http - by_python for by_http, by_python in pairs),
        "all": {**found.values, **{f"short_{name}": values for name, values in short.values.items()}},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="medians of so many are printed (default: 15)")
    parser.add_argument(
        "--firsts", type=int, default=60, help="short answers whose first token is timed (default: 60)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    apply_thread_settings(None)  # as the API does
    found = asyncio.run(figures(asked.rounds, asked.firsts, asked.tokens))
    if asked.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            if name != "all":
                print(f"{name.replace('_', ' '):28}{value:10.3f}")
    return 1 if found["ratio"] < LEAST_RATIO or found["first_token_more_ms"] > MOST_FIRST_MS else 0


if __name__ == "__main__":
    sys.exit(main())
