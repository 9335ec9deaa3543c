"""What a check finds, and running checks so that none can stop the others.

Knows nothing of what is checked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from petals_win.errors import UserError

logger = logging.getLogger(__name__)

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Asked:
    """What the user wants to do on this PC; None and () are "not said"."""

    model: str | None = None
    peers: tuple[str, ...] = ()
    port: int | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Finding:
    """One line. `fix` is what to do about it, empty for what is ok."""

    level: Level
    text: str
    fix: str = ""


Check = Callable[[Asked], Iterator[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]], asked: Asked) -> Iterator[tuple[str, Finding]]:
    """The name of each check with each of its findings, as they come. An exception is a finding, too."""
    for name, check in checks:
        try:
            for finding in check(asked):
                yield name, finding
        except UserError as e:
            yield name, finding_of(e)
        except Exception as e:
            logger.debug("The check %r crashed", name, exc_info=True)
            yield name, Finding(
                "error", f"The check of {name} crashed: {_described(e)}", "petals-win --debug doctor shows where."
            )


def finding_of(error: UserError, level: Level = "error") -> Finding:
    """An error as a finding: its first sentence says what is the matter, the rest what to do."""
    first, *rest = re.split(r"(?<=[.:]) (?=[A-Z])", str(error), maxsplit=1)
    return Finding(level, first, rest[0] if rest else "Put that right, then try again.")


def _described(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0].rstrip('.')}" if said else type(error).__name__
