"""How many tokens of long prompts one turn of the scheduler computes, by how long turns have taken, and what prompts do to decodes.

What a chunk costs those who decode is more than its own turn's time: they may be on their way through other nodes, which compute chunks of
the same prompt, perhaps on the same cores. So it is measured how much later they come again. Knows durations. Does not know what is computed.
"""

from __future__ import annotations

from enum import Enum, auto

# A turn without decodes lasts no longer, since the first one that comes waits for its end.
_TURN_S = 0.4
# Of what decodes take alone: what a chunk beside them may take, and one that is computed while they are away, even if that is shorter.
_BESIDE, _BETWEEN = 0.6, 0.3
# So many times as late as without prompts decodes may come again. First what is computed beside them grows up to its bound, at a share of
# 1, since weights are read for it anyway; then what is computed between, up to a share of 2, which begins with a part worth a turn.
_LATER = 1.55
_LEAST_SHARE, _WORTH_A_TURN, _MOST_SHARE = 0.25, 1.2, 2.0
_GAIN, _LESS, _MORE = 0.3, 0.8, 1.1
# Of the last time in how soon they come again without a prompt here: that they come later may be a prompt's at another node.
_SOONER_AGAIN, _LATER_AGAIN = 0.3, 0.03
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
        self._again_s: float | None = None  # from one turn of a session that decodes to its next, without prompts
        self._share = 1.0

    def tokens(self, decodes: Decodes, room: int | None = None) -> int:
        """The size of the next one. `room`: so many tokens beside the decodes that are here hardly make their turn longer."""
        size = self._sizes[decodes]
        return min(size, room) if decodes is Decodes.HERE and room is not None and room >= _WORTH_ROOM else size

    @property
    def rest_s(self) -> float:
        """For so many seconds behind a turn with decodes nothing is to be computed until they come again."""
        return 2 * self._again_s if self._again_s is not None and self._share < _WORTH_A_TURN else 0.0

    def came_again(self, seconds: float, beside_a_prompt: bool) -> None:
        """So long after their last turn sessions have had a turn with decodes; meanwhile this node had a prompt, or none."""
        if self._again_s is None:
            self._again_s = None if beside_a_prompt else seconds
        elif not beside_a_prompt:
            self._again_s += (_SOONER_AGAIN if seconds < self._again_s else _LATER_AGAIN) * (seconds - self._again_s)
        else:
            change = 1 + _GAIN * (_LATER - seconds / max(self._again_s, 1e-6))
            share = self._share * min(max(change, _LESS), _MORE)
            self._share = min(max(share, _LEAST_SHARE), _MOST_SHARE)

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
                allowed = min(self._share, 1.0) * _BESIDE * self._decodes_s
                self._change(decodes, tokens, allowed, seconds - self._decodes_s)
            else:
                share = 1.0 if self._again_s is None else max(self._share - 1.0, _WORTH_A_TURN - 1.0)
                allowed = share * max(_BETWEEN * self._decodes_s, away_s)
                self._change(decodes, tokens, min(allowed, _TURN_S), seconds)

    def _change(self, decodes: Decodes, tokens: int, allowed: float, seconds: float) -> None:
        """Not at once: a single turn may have been held up by something else. Fewer tokens than there might have been tell of more only
        that they would take too long."""
        size, ratio = self._sizes[decodes], min(max(allowed / max(seconds, 1e-6), 0.6), 1.5)
        if tokens < size:
            changed = min(size, max(tokens * ratio, 0.6 * size)) if ratio < 1 else size
        else:
            changed = size * ratio
        self._sizes[decodes] = max(min(round(changed), self._most), _LEAST)
