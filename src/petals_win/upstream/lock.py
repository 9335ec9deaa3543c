"""external/upstream.lock: which wheels the distribution is built from. Knows the file's fields; fetches nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from petals_win.errors import UserError


@dataclass(frozen=True)
class Pin:
    """One upstream wheel.

    name: of the distribution and of its import package. sha256, bytes: of the wheel file.
    folder: below external/, the import root that the package is generated into.
    licence: as the wheel states it. licence_file, daemon: paths inside the wheel; the daemon is a Linux program
    that is left out of the generated tree.
    """

    name: str
    version: str
    filename: str
    sha256: str
    bytes: int
    licence: str
    origin: str
    folder: str
    licence_file: str
    daemon: str | None


def read_lock(path: Path) -> tuple[Pin, ...]:
    """Raises UserError if the file is missing or not what this version writes."""
    try:
        return tuple(Pin(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["upstream"])
    except OSError as e:
        raise UserError(
            f"{path} cannot be read ({e.strerror}). Patches are applied in a checkout of petals-win."
        ) from e
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} is damaged ({e}). Restore it from version control.") from e
