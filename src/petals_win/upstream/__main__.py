"""`python -m petals_win.upstream build`: the build for a Python that has no command line library yet."""

from __future__ import annotations

import argparse
import logging
import sys

from petals_win.errors import UserError
from petals_win.upstream.build import build, this_checkout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m petals_win.upstream", description="Fetch and patch upstream.")
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--force", action="store_true", help="build even if the trees are up to date")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        build(this_checkout(), force=arguments.force)
    except UserError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
