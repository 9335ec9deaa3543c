"""README's table of families has a row for each family that is tested, and no measured difference beyond the bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_in_the_readme_is_current():
    command = [sys.executable, "-X", "utf8", str(ROOT / "scripts" / "families.py"), "--check"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
