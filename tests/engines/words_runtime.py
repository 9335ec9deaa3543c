"""Descriptions of the runtimes in runtimes/: words.py, and once.py, which is started for each question."""

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


def described_once(folder: Path, more: str = "", *, arguments: str = "", model: str = "", **tables: str) -> str:
    """The same of a program that is started for each question. `arguments` and `model` are added to theirs."""
    text = f"""
dialect = "cli"
program = {json.dumps(sys.executable)}
arguments = [{json.dumps(str(HERE / "runtimes" / "once.py"))}, {json.dumps(str(PROSE))}, {arguments}]
{more}

[options]
max_tokens = ["-n", "{{max_tokens}}"]
temperature = ["--temp", "{{temperature}}"]
seed = ["--seed", "{{seed}}"]

[[models]]
name = "letters"
context_length = 512
{model}
"""
    for name, body in tables.items():
        text += f"\n[{name}]\n{body}\n"
    path = folder / "once.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)
