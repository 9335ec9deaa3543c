"""Whether answers wait for each other, so that their next steps set out together.

A step of eight answers costs little more than a step of two. Left alone, answers fall into as many groups as there are stations on
their way: while one is at a node, the next one gathers behind it. Where all nodes share a PC, the weights are then read
several times for one token of each answer. On PCs of their own, several groups let each PC work while the others do. So both ways
are tried, and the faster one is kept for a while. Knows answers and times. Does not know models, sessions or networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

_RECENT = 0.2  # of the last step in the mean of what a step takes
_FASTER = 1.1  # times as many tokens a second is what going apart must give
# Rounds, each of one token for all answers: before a way is measured, while it is, and until the other one is tried again.
# Settling is as long as nodes on this PC take to notice how many cores they have when they work by turns, or at once.
_SETTLING, _MEASURED, _KEPT = 6, 8, 256


class Rounds:
    """The running answers of one event loop that take one token at a time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._out: dict[Hashable, float] = {}  # whose step is on its way, since when
        self._here: dict[Hashable, float] = {}  # who waits for a turn, since when
        self._step_s = 0.0
        self._together = True
        self._known = {0: _Known()}  # by the number of answers
        self._answers = 0
        self._tokens = 0  # since that number or the way changed
        self._since = 0.0
        self._parting = 0  # of how many answers to come every second is held back

    def leaves(self, answer: Hashable, tokens: int) -> float:
        """The answer has had its turn, and its next step has so many tokens; for how many seconds to hold that back."""
        self._here.pop(answer, None)
        if tokens > 1:  # nobody can tell when a long one comes again
            return 0.0
        self._count()
        held = self._step_s / 2 if self._parting % 2 else 0.0
        self._parting = max(0, self._parting - 1)
        self._out[answer] = self._clock() + held
        return held

    def came(self, answer: Hashable) -> None:
        """The answer's step is through, and it waits for its turn."""
        now = self._clock()
        if (left := self._out.pop(answer, None)) is not None:
            self._step_s += _RECENT * (now - left - self._step_s) if self._step_s else now - left
        self._here[answer] = now

    def ended(self, answer: Hashable) -> None:
        """The answer takes no further tokens."""
        self._out.pop(answer, None)
        self._here.pop(answer, None)

    def wait(self) -> float:
        """For how many seconds those who are here should wait for those on their way; 0: not at all.

        No longer than a step takes: who is later than that does not belong to them.
        """
        if not self._together or not self._out or not self._here:
            return 0.0
        return max(0.0, min(self._here.values()) + self._step_s - self._clock())

    def _count(self) -> None:
        """One token more."""
        now, answers = self._clock(), len(self._out) + len(self._here) + 1
        if answers != self._answers:
            self._answers = answers
            known = self._known.setdefault(answers, _Known())
            self._change_to(known.together, now)
            return
        self._tokens += 1
        known = self._known[answers]
        known.tokens += 1
        if self._tokens == _SETTLING * answers:
            self._since = now
        elif self._tokens == (_SETTLING + _MEASURED) * answers:
            known.rates[self._together] = _MEASURED * answers / max(now - self._since, 1e-6)
            together = known.together if len(known.rates) > 1 else not self._together
            if answers > 1 and together != self._together:
                self._change_to(together, now)
        elif known.tokens >= _KEPT * answers:
            known.tokens = 0
            if answers > 1:
                self._change_to(not self._together, now)

    def _change_to(self, together: bool, now: float) -> None:
        # Those who come together would stay so without being made to wait.
        self._parting = 0 if together else self._answers
        self._together, self._tokens, self._since = together, 0, now


@dataclass
class _Known:
    """Of one number of answers: tokens per second by the way, and tokens since both were tried."""

    rates: dict[bool, float] = field(default_factory=dict)
    tokens: int = 0

    @property
    def together(self) -> bool:
        """Whether that is the faster way; True as long as not both are known."""
        return len(self.rates) < 2 or self.rates[True] * _FASTER > self.rates[False]
