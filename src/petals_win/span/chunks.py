"""How many tokens of long prompts one turn of the scheduler computes, by how long turns have taken.

Knows durations. Does not know what is computed.
"""

from __future__ import annotations

# A turn without decodes lasts so long, as a decode that comes in its middle waits for its end; with decodes, it is longer by this
# part than a turn of decodes alone.
_TURN_S = 0.4
_LONGER_BY = 0.7
_LEAST = 8
_RECENT = 0.3  # of the last turn in a mean of turns


class Chunks:
    """The size of chunks, of all rows together."""

    def __init__(self, most: int) -> None:
        """`most` bounds the memory for activations."""
        self._most = most
        self._alone = min(256, most)
        self._beside = 16
        self._decodes_s: float | None = None

    def tokens(self, decodes: bool) -> int:
        """The size of the next one, beside decodes or without them."""
        return self._beside if decodes else self._alone

    def took(self, decodes: bool, tokens: int, seconds: float) -> None:
        """A turn has taken so long for decodes, if there were any, and so many tokens of prefills."""
        if not decodes:
            self._alone = self._towards(self._alone, _TURN_S / max(seconds, 1e-6))
        elif not tokens:
            before = seconds if self._decodes_s is None else self._decodes_s
            self._decodes_s = before + _RECENT * (seconds - before)
        elif self._decodes_s is not None:
            allowed, longer = _LONGER_BY * self._decodes_s, seconds - self._decodes_s
            self._beside = self._towards(self._beside, allowed / longer if longer > 0 else 2.0)

    def _towards(self, tokens: int, ratio: float) -> int:
        """Not at once: a single turn may have been held up by something else."""
        return max(min(round(tokens * max(min(ratio, 1.5), 0.6)), self._most), _LEAST)
