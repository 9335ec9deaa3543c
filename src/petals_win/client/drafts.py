"""Guesses at how an answer goes on, looked up in what it said before, and whether checking them takes less time than it saves.

Several guesses cost one step through the blocks, which is longer than that of one token, and those that were right are tokens won.
An answer that has the PCs to itself leaves them much to spare; several answers at once, whose tokens share steps, do not. Knows token
ids, times and counts. Does not know how tokens are checked.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

import torch

_MATCHES = (3, 2)  # last tokens that have to have come before, the better ones first
_LENGTHS = (2, 4, 8, 15)  # of drafts; with the token before them at most 16, which nodes take at once
_SAMPLES = 5  # of each kind of time
_MARGIN = 0.9  # of a plain step's time for each token, below which drafts are made
_LONGER = 0.98  # what a longer draft has to make of a shorter one's time for each token
_DOUBT = 0.5  # guesses right and wrong, each, that are taken for seen before any was checked
_MEMORY = 0.7  # of what was seen, at each draft: texts change
_RECOVERY = 0.99  # of what was seen, at each token without a draft, so that they are tried again
_PATIENCE = 100  # tokens without a draft, after which times are measured anew


class Pace:
    """How long it takes from one token of an answer that runs alone to its next, by what was sent. Kept for later answers.

    Of each kind the median of the last ones counts, since a PC that others use is now and then slow.
    """

    def __init__(self) -> None:
        self._times: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))

    def took(self, tokens: int, seconds: float) -> None:
        """A step with so many tokens took so long."""
        self._times[tokens].append(seconds)

    @property
    def plain(self) -> float | None:
        """Seconds of a step with one token; None before it has been measured well."""
        return self.of(1) if len(self._times[1]) > _SAMPLES // 2 else None

    def of(self, tokens: int) -> float | None:
        """Seconds of a step with so many; None before one was made."""
        times = self._times[tokens]
        return median(times) if times else None


class Drafter:
    """Makes the drafts of one answer. Used by one thread."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._seen = {length: [0.0, 0.0] for length in _MATCHES}  # guesses right and wrong, by the match
        self._match = 0  # of the draft in work
        self._without = 0  # tokens since the last draft

    def draft(self, ids: torch.Tensor, most: int) -> list[int]:
        """At most `most` tokens that may follow `ids` (int64, [tokens]); none if it would not pay."""
        plain = self._pace.plain
        if plain is None or most < _LENGTHS[0]:
            return []
        for match in _MATCHES:
            if (length := self._best_length(match, most, plain)) and (found := look_up(ids, match, length)):
                self._match, self._without = match, 0
                return found
        self._without += 1
        for seen in self._seen.values():
            seen[:] = (count * _RECOVERY for count in seen)
        return []

    def checked(self, drafted: int, right: int) -> None:
        """Of the last draft of `drafted` tokens the first `right` were."""
        seen = self._seen[self._match]
        seen[:] = seen[0] * _MEMORY + right, seen[1] * _MEMORY + (right < drafted)

    def _best_length(self, match: int, most: int, plain: float) -> int:
        """How many tokens a draft should have, 0 for none."""
        right, wrong = self._seen[match]
        likely = (right + _DOUBT) / (right + wrong + 2 * _DOUBT)
        best, best_time, known = 0, plain * _MARGIN, plain
        for length in _LENGTHS:
            if length > most:
                break
            known = self._pace.of(length + 1) or known  # what was not tried is hoped to be no longer
            time = max(plain, known) / sum(likely**number for number in range(length + 1))
            if time < best_time * (_LONGER if best else 1.0):
                best, best_time = length, time
        if best == 0 and self._without >= _PATIENCE:  # what is known of times may be old
            return _LENGTHS[0]
        return best


def look_up(ids: torch.Tensor, match: int, length: int) -> list[int]:
    """What followed the last `match` tokens of `ids` (int64, [tokens]) where they came before: `length` tokens, or none.

    Of several places the last counts. Where fewer tokens follow, the text repeats itself with that period, and so does the draft.
    """
    end = len(ids)
    if end <= match:
        return []
    found = torch.ones(end - match, dtype=torch.bool)
    for number in range(match):
        found &= ids[number : end - match + number] == ids[end - match + number]
    places = found.nonzero()
    if not len(places):
        return []
    begin = int(places[-1]) + match
    draft = ids[begin : begin + length].tolist()
    period = len(draft)
    return [draft[number % period] for number in range(length)]
