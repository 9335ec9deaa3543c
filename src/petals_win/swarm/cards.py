"""Graphics cards as they are sold: how much memory they have, and how fast it is.

Knows figures that NVIDIA publishes. Does not know what a program reaches of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """Memory in GiB, and what can be read of it in a second, in 10^9 bytes."""

    name: str
    gib: int
    gb_per_s: int


CARDS = (
    Card("RTX 3050", 8, 224),
    Card("RTX 3060", 12, 360),
    Card("RTX 3060 Ti", 8, 448),
    Card("RTX 3070", 8, 448),
    Card("RTX 3070 Ti", 8, 608),
    Card("RTX 3080", 10, 760),
    Card("RTX 3080 Ti", 12, 912),
    Card("RTX 3090", 24, 936),
    Card("RTX 3090 Ti", 24, 1008),
    Card("RTX 4060", 8, 272),
    Card("RTX 4060 Ti", 8, 288),
    Card("RTX 4060 Ti 16GB", 16, 288),
    Card("RTX 4070", 12, 504),
    Card("RTX 4070 Super", 12, 504),
    Card("RTX 4070 Ti", 12, 504),
    Card("RTX 4070 Ti Super", 16, 672),
    Card("RTX 4080", 16, 717),
    Card("RTX 4080 Super", 16, 736),
    Card("RTX 4090", 24, 1008),
    Card("RTX 5060", 8, 448),
    Card("RTX 5060 Ti", 8, 448),
    Card("RTX 5060 Ti 16GB", 16, 448),
    Card("RTX 5070", 12, 672),
    Card("RTX 5070 Ti", 16, 896),
    Card("RTX 5080", 16, 960),
    Card("RTX 5090", 32, 1792),
)


def find_card(name: str) -> Card | None:
    """The card of this name, however it is spelled; None: it is not in the table."""
    return next((card for card in CARDS if _plain(card.name) == _plain(name)), None)


def slowest_with(total_bytes: int) -> Card | None:
    """Of the cards with so much memory, or else of those with the next larger, the slowest; None: all have less."""
    large = [card for card in CARDS if card.gib * GIB >= total_bytes]
    return min(large, key=lambda card: (card.gib, card.gb_per_s), default=None)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
