"""How many tokens of long prompts one turn of the scheduler computes, by how long turns have taken.

Knows durations. Does not know what is computed.
"""

from __future__ import annotations

from enum import Enum, auto

# A turn without decodes lasts no longer, since the first one that comes waits for its end.
_TURN_S = 0.4
# Of what decodes take alone: what a chunk beside them may take, and one that is computed while they are away, even if that is shorter.
_BESIDE, _BETWEEN = 0.4, 0.3
_LEAST = 8
_WORTH_ROOM = 4
_RECENT = 0.3  # of the last turn in a mean of turns


class Decodes(Enum):
    """Where the sessions are that take one token after the other."""

    NOWHERE = auto()
    ELSEWHERE = auto()  # they have been here a moment ago, and come again
    HERE = auto()


class Chunks:
    """The size of chunks, of all rows together."""

    def __init__(self, most: int) -> None:
        """`most` bounds the memory for activations."""
        self._most = most
        self._sizes = {Decodes.NOWHERE: min(256, most), Decodes.ELSEWHERE: 32, Decodes.HERE: 16}
        self._decodes_s: float | None = None

    def tokens(self, decodes: Decodes, room: int | None = None) -> int:
        """The size of the next one. `room`: so many tokens beside the decodes that are here hardly make their turn longer."""
        size = self._sizes[decodes]
        return min(size, room) if decodes is Decodes.HERE and room is not None and room >= _WORTH_ROOM else size

    def took(self, decodes: Decodes, tokens: int, seconds: float, away_s: float) -> None:
        """A turn has taken so long for decodes, if they were here, and so many tokens of prefills.

        `away_s`: for how many seconds decodes are elsewhere between two turns.
        """
        if decodes is Decodes.NOWHERE:
            if tokens >= self._sizes[decodes]:  # who sends shorter parts is not to find them cut in two
                self._change(decodes, tokens, _TURN_S, seconds)
        elif not tokens:
            before = seconds if self._decodes_s is None else self._decodes_s
            self._decodes_s = before + _RECENT * (seconds - before)
        elif self._decodes_s is not None:
            if decodes is Decodes.HERE:
                self._change(decodes, tokens, _BESIDE * self._decodes_s, seconds - self._decodes_s)
            else:
                self._change(decodes, tokens, min(max(_BETWEEN * self._decodes_s, away_s), _TURN_S), seconds)

    def _change(self, decodes: Decodes, tokens: int, allowed: float, seconds: float) -> None:
        """Not at once: a single turn may have been held up by something else. Fewer tokens than there might have been tell of more only
        that they would take too long."""
        size, ratio = self._sizes[decodes], min(max(allowed / max(seconds, 1e-6), 0.6), 1.5)
        if tokens < size:
            changed = min(size, max(tokens * ratio, 0.6 * size)) if ratio < 1 else size
        else:
            changed = size * ratio
        self._sizes[decodes] = max(min(round(changed), self._most), _LEAST)
