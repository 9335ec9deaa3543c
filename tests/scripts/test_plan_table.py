"""README's table of what large models take is what the plan says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_in_the_readme_is_current():
    command = [sys.executable, "-X", "utf8", str(ROOT / "scripts" / "plan_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
