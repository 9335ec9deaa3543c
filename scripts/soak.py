"""Many streaming clients of `petals-win up` for a minute: whether each gets a whole answer or a clean 429, and what is left of it.

Run by scripts/soak, in .venv. Memory is that of all processes, ten seconds after the beginning and at the end; speed is that of
one question before all others and after them. Texts are shorter than a page of kept states, so nodes keep nothing of them on purpose.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from petals_win.bench.soak import Soaked, soak
from petals_win.bench.up import Up, up
from petals_win.models.source import DEFAULT_MODEL

TOKENS = 32  # of an answer
SETTLED_S = 10.0
QUESTIONS = 3  # of which the fastest counts: what else the PC does makes a question slower, never faster


async def tokens_per_s(running: Up) -> float:
    """Of one client alone."""
    speeds = []
    for _ in range(QUESTIONS):
        began = time.perf_counter()
        found = await soak(running.url, DEFAULT_MODEL, clients=1, seconds=0, tokens=TOKENS)
        speeds.append(found.tokens / (time.perf_counter() - began))
    return max(speeds)


async def measure(running: Up, clients: int, seconds: float) -> dict[str, Any]:
    before = await tokens_per_s(running)
    began = time.perf_counter()
    soaking = asyncio.create_task(soak(running.url, DEFAULT_MODEL, clients=clients, seconds=seconds, tokens=TOKENS))
    await asyncio.sleep(min(SETTLED_S, seconds))
    settled = running.memory_bytes()
    found: Soaked = await soaking
    took = time.perf_counter() - began
    memory = running.memory_bytes()
    after = await tokens_per_s(running)
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "answers": found.answers,
        "refused": found.refused,
        "wrong": dict(found.wrong),
        "tokens_per_s": round(found.tokens / took, 2),
        "settled_mib": round(settled / 2**20),
        "memory_mib": round(memory / 2**20),
        "memory_ratio": round(memory / settled, 4),
        "alone_before_tokens_per_s": round(before, 2),
        "alone_after_tokens_per_s": round(after, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64, help="at the same time (default: 64)")
    parser.add_argument("--seconds", type=float, default=60, help="for which they ask (default: 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    with up(Path(sys.executable)) as running:
        found = asyncio.run(measure(running, asked.clients, asked.seconds))
    if asked.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name.replace('_', ' '):28}{value}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
