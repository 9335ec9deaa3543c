"""What workers give and cost: two of them over one, a token's way over gRPC and ZeroMQ, and questions while workers are killed.

Run by scripts/workers, in .venv; everything is on loopback. Eight questions are answered by one worker with the default model and one thread, and by two.
Tokens of a scripted engine are timed from their making to their arrival, over each transport and directly, in turns: on cores that are awake, as they
are where a model computes, and on such as sleep between two tokens, which has no bound: waking up is most of it. With --kills, workers are
killed and start again that often while eight clients ask, and nothing else is measured: with a tiny random model, or with --scripted with none.
The exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from petals_win.bench.busy import awake_cores
from petals_win.bench.kills import Killed, soak_kills
from petals_win.bench.steady import MODEL as STEADY
from petals_win.bench.tiny_model import make_tiny_model
from petals_win.bench.workers import STREAMS, measure_overheads, measure_shares, overheads
from petals_win.errors import UserError

MOST_SHARE = 0.65  # of the time that one worker takes
MOST_MEDIAN_MS, MOST_P99_MS = 0.5, 3.0
MOST_MEMORY, MEMORY_MIB = 1.05, 8  # of what the router took when all had begun, and what may come on top
MOST_REFUSED = 0.01  # of as many as were answered
KILL_SECONDS, SCRIPTED_KILL_SECONDS = 30, 6  # for each kill and return, at most, of all of them together


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def measure(home: Path, rounds: int, tokens: int) -> dict[str, Any]:
    from petals_win.models.default_model import default_model_file

    with awake_cores():
        delays = await measure_overheads(home, rounds, 4 * tokens, say)
    asleep = await measure_overheads(home, max(1, rounds // 3), 4 * tokens, say)
    shares = await measure_shares(str(default_model_file()), home, rounds, tokens, say)
    return {
        "one_worker_s": shares.median("one_s"),
        "two_workers_s": shares.median("two_s"),
        "share": shares.ratio("two_s", "one_s"),
        **overheads(delays),
        **{f"asleep_{name}": value for name, value in overheads(asleep).items()},
        "all": shares.values,
    }


def missed(found: dict[str, Any]) -> list[str]:
    """The bounds that the figures do not keep, a sentence each."""
    sentences = []
    if found["share"] > MOST_SHARE:
        sentences.append(f"two workers took {found['share']:.3f} of the time of one, and at most {MOST_SHARE} is due")
    for scheme in ("grpc", "zmq"):
        for streams in STREAMS:
            for name, most in (("median", MOST_MEDIAN_MS), ("p99", MOST_P99_MS)):
                took = found[f"{scheme}_{streams}_{name}_ms"]
                if took > most:
                    sentences.append(
                        f"{scheme}, {streams} streams: {name} {took:.3f} ms, and at most {most} ms is due"
                    )
    return sentences


def figures_of(killed: Killed) -> dict[str, Any]:
    return {
        "kills": killed.kills,
        "answers": killed.answers,
        "broken_off": killed.broken,
        "refused": killed.refused,
        "wrong": dict(killed.wrong),
        "examples": killed.examples,
        "settled_mib": round(killed.settled_bytes / 2**20, 1),
        "memory_mib": round(killed.memory_bytes / 2**20, 1),
        "seconds": round(killed.seconds, 1),
    }


def missed_by(found: dict[str, Any]) -> list[str]:
    """The same of a soak."""
    allowed = MOST_MEMORY * found["settled_mib"] + MEMORY_MIB
    checks = {
        f"some questions got neither a whole answer nor one clear error: {found['wrong']}": not found["wrong"],
        "no question was answered": found["answers"] > 0,
        f"{found['refused']} questions found no worker, though one of each pair was there": found["refused"]
        <= MOST_REFUSED * found["answers"],
        f"memory grew from {found['settled_mib']} to {found['memory_mib']} MiB": found["memory_mib"] <= allowed,
    }
    return [sentence for sentence, kept in checks.items() if not kept]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/workers", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="medians of so many are printed (default: 7)")
    parser.add_argument("--tokens", type=int, default=32, help="of each of the eight answers (default: 32)")
    parser.add_argument("--kills", type=int, default=0, help="kill workers so often instead")
    parser.add_argument("--scripted", action="store_true", help="with --kills: workers without a model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    if asked.scripted and not asked.kills:
        parser.error("--scripted is for --kills")
    logging.getLogger("petals_win.jobs").setLevel(logging.ERROR)  # each kill is a warning
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        try:
            if asked.kills:
                model = STEADY if asked.scripted else str(make_tiny_model(home / "tiny"))
                seconds = 300 + asked.kills * (SCRIPTED_KILL_SECONDS if asked.scripted else KILL_SECONDS)
                pairs = 2 if asked.scripted else 1
                soaking = soak_kills(model, home, asked.kills, pairs=pairs, tokens=100, seconds=seconds, report=say)
                found = figures_of(asyncio.run(soaking))
                sentences = missed_by(found)
            else:
                found = asyncio.run(measure(home, asked.rounds, asked.tokens))
                sentences = missed(found)
        except UserError as e:
            print(f"workers: {e}", file=sys.stderr)
            return 1
    if asked.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            if name != "all":
                print(f"{name.replace('_', ' '):32}{value:10.3f}" if isinstance(value, float) else f"{name:32}{value}")
    for sentence in sentences:
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
