"""How long an idle model stays in memory, as users and Ollama's clients write it. Knows the notation alone."""

from __future__ import annotations

import math
import re

from petals_win.errors import UserError

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_LONGEST = 100  # characters


def seconds_of(written: str | float) -> float:
    """Seconds, or a text such as "90", "5m" or "1h30m"; what is below 0 is for ever (inf). Raises UserError."""
    if not isinstance(written, str):
        seconds = float(written)
    elif len(written) <= _LONGEST and (found := re.fullmatch(rf"([+-]?)((?:{_PART})+)", written)):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, found[2]))
        seconds = -seconds if found[1] == "-" else seconds
    elif len(written) <= _LONGEST and re.fullmatch(r"[+-]?\d+(\.\d*)?", written):
        seconds = float(written)
    else:
        raise UserError(
            "Write how long an idle model is kept as 5m, 90s, 1h30m or a number of seconds; -1 is for ever."
        )
    if math.isnan(seconds):
        raise UserError("Write how long an idle model is kept as a number of seconds; -1 is for ever.")
    return math.inf if seconds < 0 else seconds
