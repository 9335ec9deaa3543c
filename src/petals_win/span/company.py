"""Whether a turn of the scheduler is worth a moment's wait, since sessions that were answered together mostly come again together.

Without it the first one back starts a turn for itself, and all others the next one: two passes for one token of each, time and again.
With passes of 50 ms and 8 more for each session, 8 sessions that came again after 4 ms made 63 steps a second instead of 48, two made 26
instead of 17. Knows sessions and times. Does not know what is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from weakref import WeakKeyDictionary

from petals_win.span.session import Session

# A wait is at most this part of what the turn before has taken: for decodes that wait, and for prefills alone.
_OF_DECODES, _OF_PREFILLS = 0.15, 0.5
# Steps that set out together come one after the other: as long as each is no later than this part of a turn, but no longer than that.
_NEXT, _ALL = 0.08, 0.25
_PAUSE_S = 1.0  # who comes again later than this was not waited for: a user thinks, or a client is through
_RECENT = 0.2  # of the last one in the mean time to come again
_LATER = 0.002  # of one that was away longer than usual


class Company:
    """The sessions of the last turns, and how long sessions take from an answer to their next step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: WeakKeyDictionary[Session, float] = WeakKeyDictionary()
        self._decoded: WeakKeyDictionary[Session, float] = WeakKeyDictionary()  # when they had their last turn
        self._expected: list[Session] = []
        self._returns_s = self._soonest_s = 0.0
        self._ended = self._seconds = 0.0
        self._first = self._last = 0.0  # when the steps came that come one after the other

    @property
    def away_s(self) -> float:
        """After how long sessions that were answered come again where nothing keeps them; 0 as long as none did.

        Nodes that each computed something while sessions are elsewhere, for as long as they are, would keep them longer and longer.
        """
        return self._soonest_s

    def came(self, session: Session, now: float) -> None:
        """A step of the session has arrived; in any thread."""
        with self._lock:
            seconds = now - self._answered.pop(session, -_PAUSE_S)
            if seconds < _PAUSE_S:
                self._returns_s += _RECENT * (seconds - self._returns_s)
                slowly = 0 < self._soonest_s < seconds
                self._soonest_s += (_LATER if slowly else _RECENT) * (seconds - self._soonest_s)
            if now - self._last > _NEXT * self._seconds:
                self._first = now
            self._last = now

    def turned(self, decoded: Iterable[Session], began: float, ended: float) -> float | None:
        """A turn has computed decodes of these sessions. Returns after how many seconds they came again, in the mean; None if none did."""
        self._expected = list(decoded)
        self._seconds, self._ended = ended - began, ended
        since = [ended - self._decoded.get(session, -_PAUSE_S) for session in self._expected]
        again = [seconds for seconds in since if seconds < _PAUSE_S]
        self._decoded.update(dict.fromkeys(self._expected, ended))
        with self._lock:
            self._answered.update(dict.fromkeys(self._expected, ended))
        return sum(again) / len(again) if again else None

    def wait(self, decodes: Collection[Session], now: float) -> float:
        """For how many seconds it is worth to wait; `decodes` are the sessions whose decodes wait already."""
        until = now
        longest = self._seconds * (_OF_DECODES if decodes else _OF_PREFILLS)
        if self._returns_s <= longest and _any_missing(self._expected, decodes):
            until = self._ended + min(2 * self._returns_s + longest / 4, longest)
        lately = [session for session, ended in self._decoded.items() if now - ended < _PAUSE_S]
        if decodes and _any_missing(lately, decodes):
            until = max(until, min(self._last + _NEXT * self._seconds, self._first + _ALL * self._seconds))
        return until - now


def _any_missing(sessions: Iterable[Session], decodes: Collection[Session]) -> bool:
    return any(session.cache is not None and session not in decodes for session in sessions)
