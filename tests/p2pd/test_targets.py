"""p2pd is built for every system that the distribution is for, and two builds give the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from petals_win.daemon.build import TARGETS, build_if_changed

pytestmark = pytest.mark.wine_lacks("what pip asks of the certificate store, so that Go cannot be fetched")

ROOT = Path(__file__).resolve().parents[2]

# Format and processor, as each format's specification has them: offset and bytes.
HEADERS = {
    "windows/amd64": (b"MZ", b"PE\0\0\x64\x86"),
    "windows/arm64": (b"MZ", b"PE\0\0\x64\xaa"),
    "linux/amd64": (b"\x7fELF\2\1", b"\2\0\x3e\0"),
    "linux/arm64": (b"\x7fELF\2\1", b"\2\0\xb7\0"),
    "darwin/amd64": (b"\xcf\xfa\xed\xfe\x07\0\0\1", b""),
    "darwin/arm64": (b"\xcf\xfa\xed\xfe\x0c\0\0\1", b""),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_built_for(target):
    head = build_if_changed(target).read_bytes()[:1024]
    begins, holds = HEADERS[target]
    assert head.startswith(begins) and holds in head


@pytest.mark.timeout(900)
def test_two_builds_in_two_places_are_equal(tmp_path):
    digests = set()
    for place in ("one", "a longer path/two"):
        checkout = tmp_path / place
        for folder in ("src/p2pd", "src/petals_win/daemon"):
            shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__", "bin"))
        shutil.copytree(ROOT / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("__init__.py", "errors.py"):
            shutil.copy(ROOT / "src/petals_win" / file, checkout / "src/petals_win")
        output = checkout / "p2pd"
        script = [sys.executable, str(checkout / "scripts" / "build_p2pd.py"), "--output", str(output)]
        subprocess.run(script, check=True, timeout=800)
        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
    assert len(digests) == 1
