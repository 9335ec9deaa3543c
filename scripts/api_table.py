"""README's tables of the API: its endpoints, and the fields of chats and completions. `--write` puts them there.

    .venv/bin/python scripts/api_table.py --write

They are made of what /openapi.json says, which is made of the schemas, so a new route or field appears by itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from petals_win.api.app import create_app
from petals_win.api.schemas import IGNORED, SPELLINGS, ChatRequest, CompletionRequest
from petals_win.api.settings import Settings
from petals_win.engines.base import Engine

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- api:begin -->", "<!-- api:end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="put the tables into README.md")
    how.add_argument("--check", action="store_true", help="fail if those in README.md are others")
    asked = parser.parse_args()
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"README.md has no place for the tables, between the lines {BEGIN} and {END}.", file=sys.stderr)
        return 1
    # No engine is asked for anything.
    made = tables(create_app(cast(Engine, None), settings=Settings()).openapi())
    whole = f"{before}{BEGIN}\n{made}\n{END}{after}"
    if asked.write:
        README.write_text(whole, encoding="utf-8", newline="\n")
    elif not asked.check:
        print(made)
    elif whole != before + begin + rest:
        print(
            "README.md's tables of the API are out of date. Run: python scripts/api_table.py --write", file=sys.stderr
        )
        return 1
    return 0


def tables(openapi: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    rows = ["| | endpoint | |", "|---|---|---|"]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            rows.append(row(method.upper(), f"`{path}`", operation["description"].split("\n\n")[0]))
    schemas = openapi["components"]["schemas"]
    chat, text = (schemas[name]["properties"] for name in ("ChatRequest", "CompletionRequest"))
    rows += ["", "| field | in | values | |", "|---|---|---|---|"]
    for field in sorted(chat.keys() | text.keys()):
        where = "both" if field in chat and field in text else "chats" if field in chat else "completions"
        # A field may mean other things in chats and in completions.
        kinds = [fields[field] for fields in (chat, text) if field in fields]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            pairs = (("chats", kinds[0]), ("completions", kinds[1]))
        else:
            pairs = ((where, kinds[0]),)
        also = [f"`{spelling}`" for spelling, name in SPELLINGS.items() if name == field]
        name = f"`{field}`" + (f" ({', '.join(also)})" if also else "")
        for in_what, kind in pairs:
            rows.append(row(name, in_what, values(kind, schemas), kind.get("description", "")))
    refused = sorted(ChatRequest.refused.keys() | CompletionRequest.refused.keys())
    rows.append(row(names(refused), "", "", "refused by name (400) if they ask for something"))
    rows.append(row(names(sorted(IGNORED)), "", "", "ignored: they say nothing about the text"))
    rows.append(row("anything else", "", "", "ignored, and named in the log once"))
    return "\n".join(rows)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def names(fields: list[str]) -> str:
    return ", ".join(f"`{field}`" for field in fields)


def values(kind: dict[str, Any], schemas: dict[str, Any]) -> str:
    """What a schema lets through, in words."""
    if "$ref" in kind:
        return values(schemas[kind["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in kind:
        return " or ".join(dict.fromkeys(values(each, schemas) for each in kind["anyOf"] if each != {"type": "null"}))
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if "const" in kind:
        return f"`{kind['const']}`"
    match kind.get("type"):
        case "array":
            most = f", at most {kind['maxItems']}" if "maxItems" in kind else ""
            return f"list of {values(kind['items'], schemas)}{most}"
        case "object" if "properties" in kind:
            return "{" + ", ".join(f"`{name}`" for name in kind["properties"]) + "}"
        case "object" if isinstance(kind.get("additionalProperties"), dict):
            return f"object of {values(kind['additionalProperties'], schemas)}"
        case "integer":
            return "whole number" + bounds(kind)
        case "number":
            return "number" + bounds(kind)
        case "string":
            return "text"
        case "boolean":
            return "true, false"
        case other:
            return str(other or "anything")


def bounds(kind: dict[str, Any]) -> str:
    least, most = kind.get("minimum"), kind.get("maximum")
    if most is not None and least is not None:
        return f", {least:g} to {most:g}"
    # Those of 64 bits and the like are of no interest to anybody.
    return f" from {least:g}" if least is not None and abs(least) < 2**31 else ""


if __name__ == "__main__":
    sys.exit(main())
