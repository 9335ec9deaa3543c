"""How answers fare in company: tokens per second of 1, 2 and 8 clients of `petals-win up`, on an idle PC and beside a busy program.

Run by scripts/crowd, in .venv. With --against FOLDER, another checkout that is installed there, both answer in the same run: all
settings take turns, so that what else the PC does meets them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from petals_win.bench.busy import busy_program
from petals_win.bench.up import DIRECT, up

PYTHON = Path(".venv") / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
CLIENTS = (1, 2, 8)
PROMPT = "The history of computing began with"
ANSWER_SECONDS = 600


def in_32_bits(python: Path) -> list[str]:
    """The options with which `up` of a checkout computes the default model so. One that does not know the option does by itself."""
    command = [python, "-m", "petals_win.cli.main", "up", "--help"]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=True).stdout
    return ["--quant", "none"] if "--quant" in said else []


def ask(url: str, tokens: int) -> int:
    """One greedy answer; returns how many tokens it has."""
    body = {"model": "SmolLM2-135M-Instruct", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with DIRECT.open(request, timeout=ANSWER_SECONDS) as response:
        return json.load(response)["usage"]["completion_tokens"]


def tokens_per_s(url: str, clients: int, tokens: int) -> float:
    """Of so many clients together, who ask at once and get one answer each."""
    with ThreadPoolExecutor(clients) as at_once:
        began = time.perf_counter()
        answered = sum(at_once.map(lambda _client: ask(url, tokens), range(clients)))
        return answered / (time.perf_counter() - began)


def measure(urls: dict[str, str], rounds: int, tokens: int) -> dict[str, Any]:
    """For each side and each setting such as "8 busy", tokens per second by round."""
    found: dict[str, dict[str, list[float]]] = {side: {} for side in urls}
    for url in urls.values():
        ask(url, tokens)  # what only the first answer pays for
    for number in range(1, rounds + 1):
        for busy in (False, True):
            with busy_program(busy):
                for clients in CLIENTS:
                    for side, url in urls.items():
                        setting = f"{clients} {'busy' if busy else 'idle'}"
                        speed = tokens_per_s(url, clients, tokens)
                        found[side].setdefault(setting, []).append(round(speed, 2))
                        print(f"round {number}, {side}: {setting}, {speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/crowd", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another installed checkout, measured in turns with this one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many are printed (default: 5)")
    parser.add_argument("--tokens", type=int, default=40, help="of each answer (default: 40)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    pythons = {"this": Path(sys.executable)}
    if asked.against:
        pythons["against"] = asked.against.absolute() / PYTHON
        if not pythons["against"].exists():
            parser.error(f"{asked.against} is not installed: run scripts/install there")
    with contextlib.ExitStack() as running:
        urls = {side: running.enter_context(up(python, in_32_bits(python))).url for side, python in pythons.items()}
        found = measure(urls, asked.rounds, asked.tokens)
    medians = {side: {name: statistics.median(speeds) for name, speeds in by.items()} for side, by in found.items()}
    if asked.json:
        print(json.dumps({"rounds": asked.rounds, "tokens": asked.tokens, "medians": medians, "all": found}))
        return 0
    print(
        f"Tokens/s of all clients together, medians of {asked.rounds} rounds of {asked.tokens} tokens, taking turns\n"
    )
    print(f"{'clients':16}" + "".join(f"{side:>12}" for side in medians))
    for setting in medians["this"]:
        print(f"{setting:16}" + "".join(f"{medians[side][setting]:12.1f}" for side in medians))
    return 0


if __name__ == "__main__":
    sys.exit(main())
