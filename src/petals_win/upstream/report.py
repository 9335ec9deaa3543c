"""What the patches are, for people: the table in windows_patches.md, differences, one patch in short.

Knows patches and files. Prints nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from petals_win.errors import UserError
from petals_win.upstream.patchfile import Declaration, Patch

_BEGIN, _END = "<!-- patches:begin -->", "<!-- patches:end -->"


def table(patches: Iterable[Patch]) -> str:
    """The table of all patches in Markdown."""
    rows = ["| patch | changes | why | status | drop when |", "|---|---|---|---|---|"]
    for patch in patches:
        header = patch.header
        cells = [f"`{patch.name}`", header.subject, header.why, header.status, header.drop_when]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def table_is_current(register: Path, patches: Iterable[Patch]) -> bool:
    """Whether windows_patches.md shows the patches as they are. Raises UserError if it is missing or has no place for the table."""
    text = _read(register)
    return _with_table(register, text, patches) == text


def write_table(register: Path, patches: Iterable[Patch]) -> None:
    """Put the table to its place in windows_patches.md. Raises UserError if there is none."""
    text = _with_table(register, _read(register), patches)
    register.write_text(text, encoding="utf-8", newline="\n")


def _read(register: Path) -> str:
    try:
        return register.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(
            f"{register} is missing: this is a source archive, or part of a checkout. Patches are kept in a whole checkout "
            "of petals-win alone, made by git."
        ) from e


def _with_table(register: Path, text: str, patches: Iterable[Patch]) -> str:
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(
            f"{register} has no place for the table. Write the lines {_BEGIN} and {_END} where it belongs."
        )
    return f"{before}{_BEGIN}\n{table(patches)}\n{_END}{after}"


def select(patches: Sequence[Patch], name: str) -> Patch:
    """The patch of that name; folder and ".py" may be left out. Raises UserError unless there is exactly one."""
    wanted = name.replace("\\", "/").removeprefix("patches/").removesuffix(".py")
    found = [patch for patch in patches if wanted in (patch.name[:-3], patch.name[:-3].partition("/")[2])]
    if len(found) != 1:
        known = ", ".join(patch.name[:-3] for patch in found or patches)
        raise UserError(f"{'Several patches are' if found else 'No patch is'} called {name}. Choose one of: {known}.")
    return found[0]


def as_json(patch: Patch) -> dict[str, Any]:
    """All that the patch says about itself, and what it changes."""
    header = patch.header
    return {
        "name": patch.name,
        "subject": header.subject,
        "why": header.why,
        "status": header.status,
        "upstream_issue": header.upstream_issue,
        "drop_when": header.drop_when,
        "changes": [_change(declaration) for declaration in patch.declarations],
    }


def _change(declaration: Declaration) -> dict[str, Any]:
    given = {name: value for name, value in declaration.arguments.items() if name != "digest" and value is not None}
    if declaration.code is not None and declaration.code.name:
        given["definition"] = declaration.code.name
    return {"kind": declaration.kind, "target": declaration.target, **given}


def diff(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> str:
    """A unified diff of all files that differ, with the paths that `patch -p1` understands."""
    lines: list[str] = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old != new:
            names = ("/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}")
            for line in difflib.unified_diff(_lines(old), _lines(new), *names):
                lines.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(lines)


def _lines(content: bytes | None) -> list[str]:
    """With their newlines. Unlike with splitlines(), only \\n ends one: upstream's text has other controls in it."""
    *whole, last = (content or b"").decode("utf-8", errors="replace").split("\n")
    return [f"{line}\n" for line in whole] + ([last] if last else [])
