"""Short digests of source text: how a patch notices that upstream moved. Knows text only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

UNFILLED = "?"


def normalise(text: str) -> str:
    """The text with \\n newlines, without its first line's indentation and without white space at the ends of lines."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line.removeprefix(indent) for line in lines).strip("\n")


def digest_of(text: str) -> str:
    """The first 16 hex digits of SHA-256 over the normalised text."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def digest_of_files(files: Mapping[str, bytes]) -> str:
    """The same over several files: paths with "/", and contents."""
    sha = hashlib.sha256()
    for path in sorted(files):
        content = files[path]
        if path.endswith(".py"):
            content = content.replace(b"\r\n", b"\n")
        sha.update(f"{path}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()[:16]
