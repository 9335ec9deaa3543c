"""Makes what late tests need and what takes minutes, while the installation and the first tests run: see scripts/test.py.

That is the bench of tests/windows, p2pd and the kernels for every system, and Go's compiled packages for the race detector. On the processor time
that nobody else wants; the tests wait for what is not ready, and tell what is wrong with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from petals_win.daemon.build import GO_FLAGS, TARGETS, build_if_changed, find_go  # noqa: E402
from petals_win.kernels import build as kernels  # noqa: E402

if __name__ == "__main__":
    os.nice(19)
    subprocess.run([sys.executable, ROOT / "scripts" / "windows_bench.py", "--setup"])
    race = [find_go(ROOT), "test", "-race", "-run=^$", "./..."]
    subprocess.run(race, cwd=ROOT / "src/p2pd", env={**os.environ, "GOFLAGS": GO_FLAGS, "CGO_ENABLED": "1"})
    for target in TARGETS:
        kernels.build_if_changed(target)
    for target in TARGETS:
        build_if_changed(target)
