"""Digests for whoever writes a patch: of a symbol, and into a patch that says "?". Knows patches and upstream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from petals_win.errors import UserError
from petals_win.upstream.apply import present_digest
from petals_win.upstream.digest import UNFILLED
from petals_win.upstream.patchfile import Declaration, read_patch


def digest_of_symbol(target: str, upstream: Mapping[str, bytes]) -> str:
    """The digest of "module:Symbol" or of a whole "module". Raises UserError if upstream has no such thing."""
    module, _, symbol = target.partition(":")
    return present_digest(Declaration("digest", "remove", module, symbol, {}), upstream)


def fill_digests(path: Path, patches: Path, upstream: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Write the digests that the patch leaves open. Returns pairs of symbol and digest. Raises UserError."""
    try:
        name = path.resolve().relative_to(patches.resolve()).as_posix()
        content = path.read_bytes()
    except ValueError as e:
        raise UserError(f"{path} is no patch: it is not below {patches}.") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}).") from e
    patch = read_patch(name, content)
    text = patch.text.encode()
    filled: list[tuple[str, str]] = []
    for declaration in reversed(patch.declarations):
        if declaration.digest_span is not None and declaration.arguments["digest"] == UNFILLED:
            digest = present_digest(declaration, upstream)
            start, end = declaration.digest_span
            text = text[:start] + f'"{digest}"'.encode() + text[end:]
            filled.append((declaration.target, digest))
    if filled:
        path.write_bytes(text.replace(b"\n", b"\r\n") if b"\r\n" in content else text)
    return filled[::-1]
