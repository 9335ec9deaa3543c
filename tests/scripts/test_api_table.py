"""README's tables of the API are what the schemas say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "api_table.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "utf8", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


def test_the_tables_in_the_readme_are_current():
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_what_the_tables_say():
    made = run().stdout
    assert "| POST | `/v1/chat/completions` | Answer a conversation" in made
    assert "| `temperature` | both | number, 0 to 2 |" in made
    assert "`max_tokens` (`max_new_tokens`, `n_predict`, `num_predict`) | both | whole number from -2 |" in made
    assert "| `tools` | chats | list of {`type`, `function`}, at most 128 |" in made
    for where in ("chats", "completions"):
        assert f"| `logprobs` | {where} |" in made
    assert "`suffix`" in made and "null" not in made and "None" not in made
