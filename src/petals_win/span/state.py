"""What a run of blocks keeps of a session, as all that serves sessions sees it: keys and values, recurrent states.

Knows positions and bytes. Does not know what is kept, nor how a decoder adds to it.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch


class CannotTruncate(ValueError):
    """A state cannot go back to an earlier position."""


class State(Protocol):
    """Of `position` tokens. The decoder adds to it; whoever computes a step advances the position afterwards."""

    truncates: ClassVar[bool]  # whether `truncate` works; if not, only a fork made in time leads back
    position: int
    capacity: int  # tokens that memory is there for

    @property
    def nbytes(self) -> int:
        """What it takes."""
        ...

    def grow(self, capacity: int) -> None:
        """Make room for so many tokens. Raises RuntimeError (torch's) if memory does not suffice; nothing is lost then."""
        ...

    def shrink(self, capacity: int) -> None:
        """Give back memory beyond so many tokens, at least `position`. Raises RuntimeError (torch's), after which only `free` is left."""
        ...

    def truncate(self, position: int) -> None:
        """Be as it was after `position` tokens, whatever a step has left that failed. Raises CannotTruncate."""
        ...

    def leads_to(self, position: int) -> bool:
        """Whether `truncate` and `fork` can go to this position."""
        ...

    def keep(self, position: int) -> bool:
        """Be able to go back to this position, which is ahead, until asked to keep another one.

        Returns whether a pass has to end there for it; False, too, if there would be no way back all the same.
        """
        ...

    def fork(self, position: int, capacity: int) -> State:
        """Another one, with memory of its own, as this one was after `position` tokens. A snapshot is a fork of all of them.

        Raises CannotTruncate, and RuntimeError (torch's) if memory does not suffice.
        """
        ...

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i go on from what row rows[i] (int64, [batch]) has seen."""
        ...

    def free(self) -> None:
        """Let go of the memory at once. Nothing else may be done afterwards."""
        ...
