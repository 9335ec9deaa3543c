"""Which blocks of a model each of several PCs would hold, and how many PCs a model needs.

Knows memory as it is sold and what of it is taken before a node begins. Does not know what is free on any real PC.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from petals_win.errors import UserError
from petals_win.span.needs import Needs, blocks_that_fit
from petals_win.swarm.cards import GIB, Card, find_card

# What is taken of a card or of a PC's RAM before a node begins: the desktop, the driver, torch itself. Rules of thumb.
TAKEN_OF_GPU = 1 * GIB
TAKEN_OF_RAM = 4 * GIB


@dataclass(frozen=True)
class Pc:
    """The memory of one node: of its GPU, or of the PC if it computes on the CPU."""

    kind: Literal["gpu", "ram"]
    total_bytes: int
    card: Card | None = None  # if it is known which one that is

    @property
    def free_bytes(self) -> int:
        """About what a node will find free."""
        return max(0, self.total_bytes - (TAKEN_OF_GPU if self.kind == "gpu" else TAKEN_OF_RAM))


@dataclass(frozen=True)
class Share:
    """The blocks [start, end) for one PC; none if start is end."""

    pc: Pc
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Who holds what, and the blocks that nobody can hold."""

    shares: tuple[Share, ...]
    missing: range


def make_plan(pcs: Sequence[tuple[Pc, Needs]]) -> Plan:
    """Give each PC in turn as many blocks as fit. One model may take less on one PC than on another, where it is quantized.

    Where blocks have to stay together, it may be another one's turn last: that has room for them.
    """
    plans = [_in_turn(pcs, range(len(pcs)))]
    if plans[0].missing and not pcs[0][1].cuts.anywhere:
        plans += [_in_turn(pcs, [*(n for n in range(len(pcs)) if n != last), last]) for last in range(len(pcs))]
    return min(plans, key=lambda plan: len(plan.missing))


def _in_turn(pcs: Sequence[tuple[Pc, Needs]], order: Sequence[int]) -> Plan:
    shares, start, num_blocks = dict[int, Share](), 0, 0
    for number in order:
        pc, needs = pcs[number]
        num_blocks = needs.num_blocks
        end = needs.cuts.run_from(start, blocks_that_fit(pc.free_bytes, needs))
        shares[number] = Share(pc, start, end)
        start = end
    return Plan(tuple(shares[number] for number in range(len(pcs))), range(start, num_blocks))


def pcs_needed(needs: Needs, pc: Pc, num_blocks: int | None = None) -> int | None:
    """How many PCs like `pc` hold the last `num_blocks` blocks (default: all); None if none of those do, however many there are."""
    fitting, count = blocks_that_fit(pc.free_bytes, needs), 0
    start = 0 if num_blocks is None else needs.num_blocks - num_blocks
    while start < needs.num_blocks:
        end = needs.cuts.run_from(start, fitting)
        if end == start:
            return None
        start, count = end, count + 1
    return count


def parse_gpu(text: str) -> Pc:
    """A PC with a card: the name of one in swarm/cards.py, or the size of its memory. Raises UserError."""
    card = find_card(text)
    if card is not None:
        return Pc("gpu", card.gib * GIB, card)
    try:
        return Pc("gpu", parse_size(text))
    except UserError as e:
        raise UserError(f"{e} Or name a card, such as 'RTX 3060'; no {text!r} is in the table.") from None


def parse_size(text: str) -> int:
    """Bytes of memory written as 12GiB, 12GB or 12; a GB of memory is a GiB, as it is sold. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(g|m)(?:i?b)?)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * (2**20 if (found[2] or "g").lower() == "m" else GIB)) if found else 0
    if size <= 0:
        raise UserError(f"{text!r} is no size of memory. Write it as 12GiB.")
    return size
