"""Lint, format, types and patches, in under a minute. Run by scripts/check, in .venv."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "scripts", "patches")
CHECKS = {
    "ruff": ["-m", "ruff", "check", "--quiet", *FOLDERS],
    "black": ["-m", "black", "--check", "--quiet", *FOLDERS],
    "pyright": ["-m", "pyright", "--pythonpath", sys.executable],
    "patches": ["-m", "petals_win.cli.main", "patches", "check"],
}


def main() -> int:
    """Run all checks, show the output of those that fail; 1 if there is one."""
    os.environ["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # of a newer version
    failed = []
    for name, arguments in CHECKS.items():
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        )
        print(f"{name}: {'failed' if done.returncode else 'ok'}, {time.monotonic() - began:.1f} s", flush=True)
        if done.returncode:
            print(done.stdout, flush=True)
            failed.append(name)
    if failed:
        print(f"scripts/check: {', '.join(failed)} failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
