"""Many streaming clients of `petals-win up` for a minute: whether each gets a whole answer or a clean 429, and what is left of it.

Run by scripts/soak, in .venv. The exit code is 1 if a client got anything else, an answer was silent for longer than pings are
apart, more memory is taken at the end than allowed, or one question alone is slower than before. Memory is that of all processes, ten seconds after the beginning and at the end; speed is that of
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
MOST_SILENCE_S = 30.0  # an answer begins within 10 s, be it by nothing yet, and pings come every 15 s
MOST_MEMORY = 1.05  # of what was taken when all had begun
LEAST_SPEED = 0.85  # of one question, which is not measured better than that
MOST_STILL_S = 5.0
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
        "longest_silence_s": round(found.longest_silence_s, 1),
        "stood_still_s": round(found.stood_still_s, 1),
        "tokens_per_s": round(found.tokens / took, 2),
        "settled_mib": round(settled / 2**20),
        "memory_mib": round(memory / 2**20),
        "memory_ratio": round(memory / settled, 4),
        "alone_before_tokens_per_s": round(before, 2),
        "alone_after_tokens_per_s": round(after, 2),
    }


def missed(found: dict[str, Any]) -> list[str]:
    """The bounds that the figures do not keep, a sentence each."""
    if found["stood_still_s"] > MOST_STILL_S:
        return [f"This PC stood still for {found['stood_still_s']} s, so nothing can be said. Measure again."]
    checks = {
        f"some clients got neither a whole answer nor a clean 429: {found['wrong']}": not found["wrong"],
        "no client got an answer": found["answers"] > 0,
        f"an answer was silent for {found['longest_silence_s']} s": found["longest_silence_s"] <= MOST_SILENCE_S,
        f"memory grew to {found['memory_ratio']} of what it was": found["memory_ratio"] <= MOST_MEMORY,
        "one question is slower than before": found["alone_after_tokens_per_s"]
        >= LEAST_SPEED * found["alone_before_tokens_per_s"],
    }
    return [sentence for sentence, kept in checks.items() if not kept]


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
    for sentence in (sentences := missed(found)):
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
