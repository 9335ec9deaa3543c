"""Descriptions of the runtime in runtimes/words.py, and an engine that runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROSE = HERE.parent / "data" / "prose.txt"


def described(folder: Path, more: str = "", *, models: str = '[[models]]\nname = "words"\n', **tables: str) -> str:
    """Write a description; returns its path. `more` stands before all tables, `tables` are bodies by name."""
    text = f"""
program = {json.dumps(sys.executable)}
arguments = [{json.dumps(str(HERE / "runtimes" / "words.py"))}, {json.dumps(str(PROSE))}]
{more}
{models}
"""
    for name, body in tables.items():
        text += f"\n[{name}]\n{body}\n"
    path = folder / "runtime.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)
