"""Which of the models in memory have to go so that another fits. Knows bytes; not who uses a model, nor how one goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from petals_win.engines.base import Engine
from petals_win.engines.offers import Offer
from petals_win.host.memory import available_bytes
from petals_win.span.needs import SPARE

_MIB = 2**20


class InMemory(Protocol):
    """A model that is loaded, and the offer that it came of."""

    @property
    def offer(self) -> Offer: ...
    @property
    def engine(self) -> Engine: ...


T = TypeVar("T", bound=InMemory)


def who_goes(offer: Offer, loaded: Sequence[T]) -> list[T] | None:
    """Those of `loaded` that have to go, the first ones if there is a choice; None if not even all are enough.

    What answers of those that stay may still come to take counts as taken.
    """
    going = [each for each in loaded if offer.alone_on is not None and each.offer.alone_on == offer.alone_on]
    for each in loaded:
        if _fits(offer, loaded, going):
            break
        if each not in going and each.offer.takes.keys() & offer.takes.keys():
            going.append(each)
    if not _fits(offer, loaded, going):
        return None
    for each in list(going):  # of a small one and a large one, the large one may be enough
        others = [other for other in going if other is not each]
        if each.offer.alone_on is None and _fits(offer, loaded, others):
            going = others
    return going


def _fits(offer: Offer, loaded: Sequence[T], going: Sequence[T]) -> bool:
    def room(device: str) -> float:
        freed = sum(each.offer.takes.get(device, 0) for each in going)
        staying = [each for each in loaded if each not in going]
        promised = sum(each.offer.promised(each.engine).get(device, 0) for each in staying)
        return (1 - SPARE) * (available_bytes(device) + freed - promised)

    return all(size <= room(device) for device, size in offer.takes.items())


def sizes(offer: Offer) -> str:
    """What the model takes, and what there is, as part of a sentence."""
    return "it takes " + " and ".join(
        f"{size / _MIB:,.0f} MiB with room for a conversation, and {available_bytes(device) / _MIB:,.0f} MiB are free on {device}"
        for device, size in offer.takes.items()
    )
