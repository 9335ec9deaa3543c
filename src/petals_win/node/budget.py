"""Who may take how much of the memory that a node sets aside for sessions, and who waits.

Knows bytes and an event loop; all of one budget's methods are called on that loop. Does not know tensors or networks.

The rule:

1. A session takes memory in pieces, as its tokens come, and never more than it has promised; a promise is never more than
   the whole budget.
2. Sessions that want to grow come first, the oldest before the others. Newcomers follow in the order of their arrival; one is
   let in when its first piece is free, and the next piece of each session that is in already.
3. When all sessions wait to grow, none can end by itself: then the youngest is told at once that the node is full, and gives
   back what it has. So the oldest gets all that it has promised in the end.
4. What nobody holds may keep what ended sessions have left (`spare`), and is free all the same: it shrinks in time.
5. Nobody waits longer than their deadline, which also ends a circle that goes through several nodes.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from petals_win.errors import NodeFull

_MIB = 2**20


class Spare(Protocol):
    """What takes memory only as long as nobody else needs it."""

    def shrink(self, nbytes: int) -> None:
        """Take no more than so many bytes."""
        ...


class CacheBudget:
    """`total_bytes` for all sessions of a node. `longest_wait` in seconds bounds what a newcomer may wait."""

    def __init__(self, total_bytes: int, longest_wait: float | None = None):
        self.total_bytes = total_bytes
        self.spare: Spare | None = None
        self._longest_wait = longest_wait
        self._shares: list[Share] = []  # of those that are in, the oldest first
        self._growing: dict[Share, tuple[int, asyncio.Future[None]]] = {}
        self._line: list[tuple[Share, int, asyncio.Future[None]]] = []

    @property
    def bytes_left(self) -> int:
        return self.total_bytes - sum(share.held for share in self._shares)

    async def admit(self, first: int, promise: int, piece: int, timeout: float) -> Share:
        """Let a session in with `first` bytes, which will take `piece` more at a time and never more than `promise`.

        Waits in the line up to `timeout` seconds. Raises NodeFull if that was in vain, ValueError for sizes that cannot be.
        """
        if not 0 < first <= promise <= self.total_bytes:
            raise ValueError(f"0 < {first} <= {promise} <= {self.total_bytes} does not hold")
        if self._longest_wait is not None:
            timeout = min(timeout, self._longest_wait)
        share = Share(self, promise, piece)
        granted = asyncio.get_running_loop().create_future()
        self._line.append((share, first, granted))
        self._settle()
        try:
            await asyncio.wait({granted}, timeout=max(timeout, 0))
        except BaseException:
            self._leave(share)
            raise
        if not granted.done():
            self._leave(share)
            raise NodeFull(self._full(timeout))
        return share

    def _full(self, waited: float) -> str:
        others = len(self._shares)
        return (
            f"All {self.total_bytes / _MIB:,.0f} MiB that this PC sets aside for conversations are taken by {others} of them, "
            f"and none ended within {max(waited, 0):.0f} s."
        )

    def _leave(self, share: Share) -> None:
        """Whether it is in, waits in the line, or was let in a moment ago."""
        self._line = [entry for entry in self._line if entry[0] is not share]
        self._growing.pop(share, None)
        if share in self._shares:
            self._shares.remove(share)
        self._settle()

    def _settle(self) -> None:
        """Hand out what is free to those who wait, by the rule; the rest is left to `spare`."""
        self._hand_out()
        if self.spare is not None:
            self.spare.shrink(self.bytes_left)

    def _hand_out(self) -> None:
        for share in [share for share in self._shares if share in self._growing]:
            to, granted = self._growing[share]
            if to - share.held > self.bytes_left:
                break
            share.held = to
            del self._growing[share]
            granted.set_result(None)
        if self._growing:
            # Those who were told that the node is full have not given their memory back yet: then wait for it.
            if len(self._growing) == len(self._shares):
                youngest = next(share for share in reversed(self._shares) if share in self._growing)
                self._growing.pop(youngest)[1].set_exception(NodeFull(self._full(0)))
            return
        while self._line:
            share, first, granted = self._line[0]
            pieces = sum(min(other.piece, other.promise - other.held) for other in self._shares)
            if first + pieces > self.bytes_left:
                break
            del self._line[0]
            share.held = first
            self._shares.append(share)
            granted.set_result(None)


class Share:
    """What one session holds of a budget, in bytes."""

    def __init__(self, budget: CacheBudget, promise: int, piece: int):
        self.promise, self.piece, self.held = promise, piece, 0
        self._budget = budget

    async def grow(self, to: int, timeout: float) -> None:
        """Hold `to` bytes, at most `promise`; less than it holds changes nothing. Waits up to `timeout` seconds.

        Raises NodeFull if that was in vain, or if nothing else can help the older sessions; the share is to be released then.
        """
        if to <= self.held:
            return
        if to > self.promise:
            raise ValueError(f"{self.promise} bytes were promised, not {to}")
        budget = self._budget
        granted = asyncio.get_running_loop().create_future()
        budget._growing[self] = to, granted
        budget._settle()
        try:
            await asyncio.wait({granted}, timeout=timeout)
        finally:
            budget._growing.pop(self, None)
            if granted.done() and not granted.cancelled():
                granted.exception()  # whoever is cancelled now does not ask for it
        if not granted.done():
            budget._settle()  # those behind it may fit
            raise NodeFull(budget._full(timeout))
        granted.result()

    def release(self) -> None:
        """Give everything back. Releasing twice is allowed."""
        self._budget._leave(self)
        self.held = 0
