"""Checks petals-win on the GPU of this PC against its CPU, and measures it: at most 8 minutes, without a network.

Usage: gpu-check [--device cuda|cpu] [--model FILE] [--json FILE]

Takes the torch that is installed (2.11 or newer), the trees and p2pd of this checkout, and nothing else; what is not there is
skipped with the reason, and without a torch or transformers of the right versions it ends with a sentence. Each line is "ok", "failed" or "skipped", what was looked at, and its figures. The exit status is 1 if
something failed, or nothing could be checked. `--device cpu` is its half without a GPU, small, in about a minute.

This file knows processes, deadlines and the table; the checks are in gpu_checks.py. They run one after the other in a process
of their own, which a check that failed ends (a card's error outlives its cause) and one that hangs does not survive.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "scripts" / "gpu_checks.py"
TREES = [str(ROOT / tree) for tree in ("src", "external/petals-main", "external/hivemind", "scripts")]
sys.path[:0] = TREES

from petals_win.host.process_tree import ProcessTree  # noqa: E402

TOTAL_SECONDS = 470  # less than 8 minutes
# Names of checks in gpu_checks.py, and for how many seconds each may run; together no longer than TOTAL_SECONDS.
CHECKS = {
    "device": 60,
    "int4": 25,
    "families": 100,
    "smollm2": 50,
    "memory": 30,
    "speed": 50,
    "too_large": 15,
    "full": 20,
    "swarm": 120,
}
OLDEST_TORCH = (2, 11)
LOG_LINES = 60
GRACE_SECONDS = 30  # for a process to import torch, before its first check begins


class Run:
    """One process that goes through checks, and the events that it prints."""

    def __init__(self, names: list[str], options: argparse.Namespace, log: Path):
        command = [sys.executable, PROGRAM, options.device, options.model or "", log.parent, *names]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*TREES, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUTF8": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._tree = ProcessTree()
        self._tree.add(self.process.pid)
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"event"'):
                self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def next(self, deadline: float) -> dict[str, Any]:
        """Its next event; "late" if there is none before the deadline, "gone" when it has ended."""
        try:
            return self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return {"event": "late"}

    def end(self) -> None:
        """With all that it has started: nodes end when their parent has."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self._tree.kill()
        self._tree.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # what hangs in a driver does not end even so
        self._log.close()


def run_checks(names: list[str], options: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """The results of the checks, as they come: "level", "what", "figures". A check that crashes or hangs has failed."""
    end = time.monotonic() + options.seconds
    remaining = list(names)
    reason = f"no time is left of {options.seconds} s"
    while remaining and time.monotonic() < end:
        run = Run(remaining, options, log)
        try:
            for result in _follow(run, remaining, end, options):
                yield result
                if (result["level"], result["what"]) == ("failed", "device"):
                    end, reason = 0.0, "there is no device to check"
        finally:
            run.end()
    for name in remaining:
        yield _result("skipped", name, reason)


def _follow(run: Run, remaining: list[str], end: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Events of one process as results, until it ends or has to be ended; takes what is done off `remaining`."""
    name, seconds = remaining[0], CHECKS[remaining[0]] + GRACE_SECONDS
    deadline = min(end, time.monotonic() + seconds)
    while True:
        event = run.next(deadline)
        kind = event.pop("event")
        if kind == "begin":
            name, seconds = event["name"], CHECKS[event["name"]]
            deadline = min(end, time.monotonic() + seconds)
        elif kind == "result":
            yield event
        elif kind == "end":
            remaining.remove(name)
            if not remaining or event["over"]:
                return
        else:
            remaining.remove(name)
            if kind == "gone":
                why = _last_words(run.process)
            elif time.monotonic() < end:
                why = f"it did not end within {seconds} s"
            else:
                why = f"it was not done when all checks had had {options.seconds} s"
            yield _result("failed", name, why)
            return


def _last_words(process: subprocess.Popen[str]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f"its process ended with status {process.wait(5)}; the log tells more"
    return "its process closed its output"


def _result(level: str, what: str, reason: str) -> dict[str, Any]:
    return {"level": level, "what": what, "figures": {"why": reason}}


def unfit() -> str:
    """Why this Python cannot be used, and what can; "" if it can."""
    needed = ".".join(map(str, OLDEST_TORCH))
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch. Start gpu_check.py with a Python that has {needed} or newer."
    torch = importlib.metadata.version("torch")
    if _numbers(torch)[:2] < OLDEST_TORCH:
        return f"{sys.executable} has torch {torch}. Start gpu_check.py with a Python that has {needed} or newer."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = next(need for need in project["dependencies"] if need.startswith("transformers"))
    least, below = wanted.removeprefix("transformers").split(",")
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found = "not here"
    else:
        if _numbers(least) <= _numbers(found) < _numbers(below):
            return ""
    return f"{wanted} is needed, and it is {found}. Put its wheel on PYTHONPATH: agent.md says how."


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version, or of one side of a range."""
    release = re.match(r"[\d.]+", version.lstrip("<>="))
    return tuple(map(int, release[0].strip(".").split("."))) if release else ()


def show(result: dict[str, Any]) -> None:
    figures = "  ".join(value if name == "why" else f"{name} {value}" for name, value in result["figures"].items())
    print(f"{result['level']:8} {result['what']:32} {figures}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Check petals-win on this PC's GPU against its CPU."
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for the half that needs no GPU")
    parser.add_argument(
        "--model", help="SmolLM2-135M-Instruct as a .gguf file; default: the one in petals-win's cache"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS)
    )
    parser.add_argument("--seconds", type=int, default=TOTAL_SECONDS, help="for all checks together")
    options = parser.parse_args(arguments)
    if options.model and not Path(options.model).exists():
        parser.error(f"there is no file {options.model}; check the path")
    if why := unfit():
        print(f"gpu-check: {why}", file=sys.stderr)
        return 1
    began = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        for result in run_checks(options.only, options, log):
            show(result)
            results.append(result)
        told = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    counts = {level: sum(result["level"] == level for result in results) for level in ("ok", "failed", "skipped")}
    seconds = round(time.monotonic() - began, 1)
    print(f"\n{', '.join(f'{count} {level}' for level, count in counts.items())} in {seconds} s", flush=True)
    if counts["failed"] and told:
        print("\n".join(["\nThe last lines of what the checks said besides:", *told[-LOG_LINES:]]), file=sys.stderr)
    if options.json:
        report = {"seconds": seconds, **counts, "results": results, "log": told[-LOG_LINES:]}
        options.json.write_text(json.dumps(report, indent=1), "utf-8")
    return 1 if counts["failed"] or not counts["ok"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
