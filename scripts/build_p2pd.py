"""Builds p2pd, by any Python 3.11 to 3.13, with the standard library alone.

Usage: build-p2pd [--os windows|linux|darwin] [--arch amd64|arm64] [--output FILE]
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from petals_win.daemon.build import TARGETS, build_p2pd, this_target  # noqa: E402
from petals_win.errors import UserError  # noqa: E402


def main() -> int:
    here = this_target().split("/")
    parser = argparse.ArgumentParser(prog="build-p2pd", description="Build the peer-to-peer daemon from src/p2pd.")
    parser.add_argument("--os", default=here[0], choices=sorted({target.split("/")[0] for target in TARGETS}))
    parser.add_argument("--arch", default=here[1], choices=sorted({target.split("/")[1] for target in TARGETS}))
    parser.add_argument("--output", type=Path, help="the file to write; bin/p2pd or bin/p2pd.exe without it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output or ROOT / "bin" / ("p2pd.exe" if options.os == "windows" else "p2pd")
    try:
        build_p2pd(output, f"{options.os}/{options.arch}")
    except UserError as e:
        print(f"build-p2pd: {e}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
