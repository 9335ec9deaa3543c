"""Why this PC cannot join a swarm, in sentences. Knows what a peer may answer. Does not know hivemind, which raises them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from petals_win.errors import UserError
from petals_win.host.clock import CLOCK_FIX

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TRIES = 3  # each waits 3 s for an answer, which a PC that computes for many others may take longer for


class NobodyAnswers(UserError):
    """The peers are there, but none of them takes part in a swarm. `details` go to the log."""

    def __init__(self, details: str):
        logger.debug("%s", details)
        super().__init__(
            "The peers can be reached, but none of them answers as a member of a swarm. Check that the first PC still runs "
            "petals-win, and that the address is the one that it shows now."
        )


def patiently(join: Callable[[], T]) -> T:
    """Call `join`, and again if nobody answers. Raises what the last try does."""
    for left in range(_TRIES - 1, 0, -1):
        try:
            return join()
        except NobodyAnswers:
            logger.info("None of the peers answers. They may be busy: trying %d more times", left)
    return join()


def clocks_differ(kind: Callable[[str], UserError], ahead: float) -> Callable[[str], UserError]:
    """Makes the error of the given kind for a peer whose clock is so many seconds ahead of this PC's."""
    way = "behind" if ahead > 0 else "ahead of"

    def error(details: str) -> UserError:
        logger.debug("%s", details)
        return kind(
            f"The clock of this PC is about {abs(ahead):.0f} seconds {way} that of the swarm, which needs them within 3 "
            f"seconds. {CLOCK_FIX}"
        )

    return error


def out_of_reach(kind: Callable[[str], UserError]) -> Callable[[str], UserError]:
    """Makes the error of the given kind for a peer that cannot call this PC back."""

    def error(details: str) -> UserError:
        logger.debug("%s", details)
        return kind(CANNOT_BE_REACHED)

    return error


CANNOT_BE_REACHED = (
    "The other PCs of the swarm cannot reach this one, so nobody could use its blocks. In one home network: let p2pd through "
    "this PC's firewall (on Windows: petals-win firewall add). Over the internet: give --internet, here and on the first PC."
)
