"""The hidden states that pass one boundary between two blocks in a session, kept so that another node can take a node's place.

Knows hidden states and beams. Does not know nodes or networks.
"""

from __future__ import annotations

import torch

_SHORT = 64  # tokens: shorter parts are joined with the one before, so that a part for each token is not left


class Track:
    """Hidden states [batch, tokens, hidden] from token `begin` on, in the order of the session's present beams.

    Each node reads what comes in from one track and fills the next one with what it answers. A node that takes another's place
    answers the whole past anew, of which only that is taken which is not there.
    """

    def __init__(self, begin: int = 0) -> None:
        self.begin = self.length = begin
        self._parts: list[torch.Tensor] = []

    def add(self, start: int, hidden: torch.Tensor) -> None:
        """Take the hidden states of the tokens from `start` on. Raises ValueError if tokens before them are missing."""
        if start > self.length:
            raise ValueError(f"Hidden states of token {start} came, but {self.length} tokens are known")
        known = self.length - start
        if known >= hidden.shape[1]:
            return
        self._parts.append(hidden[:, known:] if known else hidden)
        self.length = start + hidden.shape[1]
        # A token is copied once for each time that its part doubles, and no more than log2(_SHORT) times in all.
        while len(self._parts) > 1 and self._parts[-2].shape[1] <= self._parts[-1].shape[1] < _SHORT:
            self._parts[-2:] = [torch.cat(self._parts[-2:], dim=1)]

    def between(self, start: int, end: int) -> torch.Tensor:
        """The hidden states [batch, end - start, hidden] of the tokens [start, end), which must be there."""
        if not self.begin <= start < end <= self.length:
            raise ValueError(f"The tokens {start} to {end} are asked for, {self.begin} to {self.length} are known")
        found, part_end = [], self.length
        for part in reversed(self._parts):
            part_start = part_end - part.shape[1]
            if part_start < end:
                found.append(part[:, max(start - part_start, 0) : min(end, part_end) - part_start])
            if part_start <= start:
                break
            part_end = part_start
        return found[0] if len(found) == 1 else torch.cat(found[::-1], dim=1)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, which is not before `begin`."""
        while self.length > length:
            last = self._parts.pop()
            self.length -= last.shape[1]
            if self.length < length:
                self._parts.append(last[:, : length - self.length].clone())  # else all of it would stay in memory
                self.length = length

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """Go on with other beams: row i from what was row hypo_ids[i] (int64, [batch])."""
        if self._parts:
            self._parts = [self.between(self.begin, self.length)[hypo_ids]]

    def copy(self) -> Track:
        """The same now; either may grow without the other."""
        other = Track(self.begin)
        other.length, other._parts = self.length, list(self._parts)
        return other
