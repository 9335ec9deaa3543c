"""The docstring that a patch begins with. Knows its fields; not the declarations that follow."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

FIELDS = ("Why", "Status", "Upstream-issue", "Drop-when")
_STATUS = re.compile(r"pending|submitted \S+|backport \S+|windows-only|superseded-by \S+")


@dataclass(frozen=True)
class Header:
    """What a patch says about itself, each field on one line."""

    subject: str
    why: str
    status: str
    upstream_issue: str
    drop_when: str


def parse_header(docstring: str) -> Header:
    """Raises ValueError, the message of which says what is wrong with the header."""
    subject, _, rest = inspect.cleandoc(docstring).partition("\n")
    if not subject or not rest.startswith("\n"):
        raise ValueError("the docstring must begin with a subject line and a blank line")
    fields: dict[str, str] = {}
    name = ""
    for line in rest.strip().splitlines():
        if line.startswith(" ") and name:
            fields[name] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        if not colon or name not in FIELDS:
            raise ValueError(f"the header line {line!r} is none of {', '.join(f'{field}:' for field in FIELDS)}")
        if name in fields:
            raise ValueError(f"the header has the field {name}: twice")
        fields[name] = value.strip()
    for field in FIELDS:
        if not fields.get(field):
            raise ValueError(f"the header lacks the field {field}:")
    if not _STATUS.fullmatch(fields["Status"]):
        raise ValueError(
            f"the status {fields['Status']!r} is none of pending, submitted LINK, backport LINK, windows-only, "
            "superseded-by MODULE"
        )
    return Header(subject, *(fields[field] for field in FIELDS))
