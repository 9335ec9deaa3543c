"""One of several engines: what it offers, whether that is in memory, and what is said of it. Knows no other, and moves nothing."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field, replace

from petals_win.engines.base import Engine, EngineClosed, EngineStatus, Full, ModelCard, SwarmStatus, SwarmUnavailable
from petals_win.engines.offers import Offer
from petals_win.errors import UserError

LINGER_S = 1.0  # that an idle model stays in any case: one request may ask several times
PAUSE_S = 10.0  # before what could not be loaded is tried again


class NotLoaded(SwarmUnavailable):
    """A model that is offered could not be loaded; `reason` is a whole sentence."""

    def __init__(self, reason: str):
        UserError.__init__(self, reason)
        self.missing_blocks = ()


@dataclass(eq=False)
class Life:
    """A model in memory: from being loaded to being unloaded. users: what asks it now; used: when that was last (monotonic, s)."""

    offer: Offer
    engine: Engine
    users: int = 0
    used: float = field(default_factory=time.monotonic)

    @property
    def idle_s(self) -> float:
        """How long nobody has used it."""
        return 0.0 if self.users else time.monotonic() - self.used


@dataclass(eq=False)
class Member:
    """What is offered, whether or not it is in memory. keep_s: how long it may be idle; waiting: questions until it is loaded."""

    offer: Offer
    cards: tuple[ModelCard, ...]
    keep_s: float
    life: Life | None = None
    loading: asyncio.Task[UserError | None] | None = None
    since: float = 0.0  # which it is loading or failed (monotonic, s)
    failure: UserError | None = None
    leaving: bool = False  # another one needs its memory: no new question begins before it has had its turn
    waiting: int = 0

    @property
    def name(self) -> str:
        return self.cards[0].id if self.cards else self.offer.engine

    @property
    def left_s(self) -> float:
        """Seconds until it is unloaded, if nobody asks for it; inf if never, or not now."""
        if self.life is None or self.life.users or self.waiting or not self.offer.unloads:
            return math.inf
        return max(self.keep_s, LINGER_S) - self.life.idle_s

    def told_cards(self) -> list[ModelCard]:
        """The cards of the engine, whose context may be shorter than it was offered; each as old as ever."""
        if self.life is None:
            return list(self.cards)
        created = {card.id: card.created for card in self.cards}
        self.cards = tuple(
            replace(card, created=created.get(card.id, card.created)) for card in self.life.engine.models()
        )
        return list(self.cards)

    def told(self, status: SwarmStatus | None) -> EngineStatus:
        """What is said of an engine; `status` is its own, if it is in memory."""
        names, waiting = tuple(card.id for card in self.cards), self.waiting
        if self.life is not None and status is not None:
            return EngineStatus(
                self.offer.engine,
                names,
                "loaded",
                status.detail,
                status.ready,
                self.life.users,
                waiting,
                status.num_blocks,
                status.missing_blocks,
                status.peers,
                status.cache_usage,
            )
        if self.loading is not None:
            return EngineStatus(self.offer.engine, names, "loading", f"{self.name} is being loaded.", True, 0, waiting)
        if (failure := self.failure) is None:
            detail = f"{self.name} is loaded when somebody asks for it."
            return EngineStatus(self.offer.engine, names, "unloaded", detail, True, 0, waiting)
        # Memory may have become free since; what is damaged stays so until somebody tries it.
        ready = isinstance(failure, Full) and time.monotonic() - self.since >= PAUSE_S
        return EngineStatus(self.offer.engine, names, "failed", str(failure), ready, 0, waiting)


def again(error: UserError) -> UserError:
    """The same for one more who waits: an exception that several raise would keep what each of them did."""
    match error:
        case EngineClosed():
            return EngineClosed()
        case Full():
            return Full(str(error))
        case _:
            return NotLoaded(str(error))
