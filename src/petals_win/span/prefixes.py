"""What sessions leave behind when they end, for later ones that begin with the same tokens.

Tokens are counted in pages, each of which is known by a hash that covers all tokens up to its end. Nobody here can check a hash, so
it counts only for the owner who gave it. Knows states and hashes. Does not know tokens, budgets or networks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from petals_win.span.compute import ComputeThread
from petals_win.span.state import State

PAGE_TOKENS = 64


@dataclass(eq=False)
class _Left:
    """A state of whole pages."""

    owner: Hashable
    pages: tuple[bytes, ...]
    state: State
    nbytes: int


class Prefixes:
    """States of ended sessions, the one that was not used for longest first to go. All methods are called on one event loop.

    States are read and freed on the thread `compute`, in the order of the calls, so what is found may be let go at once.
    """

    def __init__(self, compute: ComputeThread) -> None:
        self._compute = compute
        self._left: dict[_Left, None] = {}  # the one that was used last comes last
        self._by_page: dict[tuple[Hashable, bytes], list[_Left]] = {}
        self._closed = False
        self.nbytes = 0

    def find(self, owner: Hashable, pages: Sequence[bytes]) -> tuple[State, int] | None:
        """The state that leads to most of these pages of one session's beginning, and how many. It may have more."""
        for count in range(len(pages), 0, -1):
            # A page at another place than it was left at is none: its owner is confused.
            for left in self._by_page.get((owner, pages[count - 1]), ()):
                if left.pages[count - 1 : count] == (pages[count - 1],) and left.state.leads_to(count * PAGE_TOKENS):
                    self._left[left] = self._left.pop(left)
                    return left.state, count
        return None

    def keep(self, owner: Hashable, pages: Sequence[bytes], state: State) -> None:
        """Take a state of all these pages, in place of those that it has the pages of."""
        if self._closed:
            self._free(state)
            return
        if (others := self._by_page.get((owner, pages[-1]))) is not None:
            self._left[others[-1]] = self._left.pop(others[-1])
            self._free(state)
            return
        known = set(pages)
        for left in [each for each in self._left if each.owner == owner and each.pages[-1] in known]:
            self._remove(left)
        left = _Left(owner, tuple(pages), state, state.nbytes)
        self._left[left] = None
        for page in left.pages:
            self._by_page.setdefault((owner, page), []).append(left)
        self.nbytes += left.nbytes

    def shrink(self, nbytes: int) -> None:
        """Keep no more than so many bytes."""
        while self._left and self.nbytes > nbytes:
            self._remove(next(iter(self._left)))

    def close(self) -> None:
        """Free everything, and keep nothing any more."""
        self._closed = True
        self.shrink(0)

    def _remove(self, left: _Left) -> None:
        del self._left[left]
        self.nbytes -= left.nbytes
        for page in left.pages:
            others = self._by_page[left.owner, page]
            others.remove(left)
            if not others:
                del self._by_page[left.owner, page]
        self._free(left.state)

    def _free(self, state: State) -> None:
        try:
            self._compute.submit(state.free)
        except RuntimeError:  # the thread has been stopped, so that nobody reads it
            state.free()
