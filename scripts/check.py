"""Lint, format, types and patches, in under a minute. Run by scripts/check, in .venv."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "scripts", "patches")
CHECKS = {
    "ruff": ["-m", "ruff", "check", "--quiet", *FOLDERS],
    "black": ["-m", "black", "--check", "--quiet", *FOLDERS],
    "pyright": ["-m", "pyright", "--pythonpath", sys.executable],
    "rooms": ["-c", "from importlinter.cli import lint_imports_command as check; check()", "--no-cache"],
    "patches": ["-m", "petals_win.cli.main", "patches", "check"],
}


def run(name: str) -> tuple[str, float, str | None]:
    """A check's name, its seconds, and what it says if it fails."""
    began = time.monotonic()
    command = [sys.executable, *CHECKS[name]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    return name, time.monotonic() - began, done.stdout if done.returncode else None


def main() -> int:
    """Run all checks at once, show the output of those that fail; 1 if there is one."""
    os.environ["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # of a newer version
    failed = []
    with ThreadPoolExecutor() as at_once:
        for name, seconds, output in at_once.map(run, CHECKS):
            print(f"{name}: {'ok' if output is None else 'failed'}, {seconds:.1f} s", flush=True)
            if output is not None:
                print(output, flush=True)
                failed.append(name)
    if failed:
        print(f"scripts/check: {', '.join(failed)} failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
