"""The hidden states that pass one boundary between two blocks in a session, kept so that another node can take a node's place.

Most are never wanted again, and of a long chat with a large model they are gigabytes: what is more than a few megabytes goes to a
temporary file. Knows hidden states and beams. Does not know nodes or networks.
"""

from __future__ import annotations

import logging

import torch

from petals_win.client.on_disk import TensorFile, TensorOnDisk

logger = logging.getLogger(__name__)

_SHORT = 64  # tokens: shorter parts are joined with the one before, so that a part for each token is not left
_IN_MEMORY = 16 * 2**20  # bytes of one track


class Track:
    """Hidden states [batch, tokens, hidden] from token `begin` on, in the order of the session's present beams.

    Each node reads what comes in from one track and fills the next one with what it answers. A node that takes another's place
    answers the whole past anew, of which only that is taken which is not there.
    """

    def __init__(self, begin: int = 0) -> None:
        self.begin = self.length = begin
        self._parts: list[torch.Tensor | TensorOnDisk] = []  # those on disk come first
        self._in_memory = 0  # bytes
        self._file: TensorFile | None = None

    def add(self, start: int, hidden: torch.Tensor) -> None:
        """Take the hidden states of the tokens from `start` on. Raises ValueError if tokens before them are missing."""
        if start > self.length:
            raise ValueError(f"Hidden states of token {start} came, but {self.length} tokens are known")
        known = self.length - start
        if known >= hidden.shape[1]:
            return
        last = hidden[:, known:] if known else hidden
        self._in_memory += last.nbytes
        self.length = start + hidden.shape[1]
        # A token is copied once for each time that its part doubles, and no more than log2(_SHORT) times in all.
        while self._parts and isinstance(before := self._parts[-1], torch.Tensor):
            if not before.shape[1] <= last.shape[1] < _SHORT:
                break
            last = torch.cat([before, last], dim=1)
            self._parts.pop()
        self._parts.append(last)
        if self._in_memory > _IN_MEMORY:
            self._put_away()

    def between(self, start: int, end: int) -> torch.Tensor:
        """The hidden states [batch, end - start, hidden] of the tokens [start, end), which must be there."""
        if not self.begin <= start < end <= self.length:
            raise ValueError(f"The tokens {start} to {end} are asked for, {self.begin} to {self.length} are known")
        found, part_end = [], self.length
        for part in reversed(self._parts):
            part_start = part_end - part.shape[1]
            if part_start < end:
                found.append(_loaded(part)[:, max(start - part_start, 0) : min(end, part_end) - part_start])
            if part_start <= start:
                break
            part_end = part_start
        return found[0] if len(found) == 1 else torch.cat(found[::-1], dim=1)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, which is not before `begin`."""
        if self.length <= length:
            return
        while self.length > length:
            last = self._parts.pop()
            self.length -= last.shape[1]
            if self.length < length:
                # A copy, or else all of it would stay in memory.
                self._parts.append(_loaded(last)[:, : length - self.length].clone())
                self.length = length
        self._count()

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """Go on with other beams: row i from what was row hypo_ids[i] (int64, [batch])."""
        if self._parts:
            self._parts = [self.between(self.begin, self.length)[hypo_ids]]
            self._count()

    def copy(self) -> Track:
        """The same now; either may grow without the other."""
        other = Track(self.begin)
        other.length, other._parts = self.length, list(self._parts)
        other._in_memory, other._file = self._in_memory, self._file
        return other

    def _count(self) -> None:
        self._in_memory = sum(part.nbytes for part in self._parts if isinstance(part, torch.Tensor))

    def _put_away(self) -> None:
        """Write all parts that are in memory to the file; where that fails, they stay."""
        held = [part for part in self._parts if isinstance(part, torch.Tensor)]
        self._in_memory = 0  # whatever comes of it: not to be tried again at each token
        try:
            self._file = self._file or TensorFile()
            written = self._file.add(torch.cat(held, dim=1))
        except OSError as e:
            logger.warning("What a session keeps for the loss of a node stays in memory: %s", e)
            return
        self._parts[-len(held) :] = [written]


def _loaded(part: torch.Tensor | TensorOnDisk) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else part.load()
