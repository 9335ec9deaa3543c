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

GIB = 2**30

# What is taken of a card or of a PC's RAM before a node begins: the desktop, the driver, torch itself. Rules of thumb.
TAKEN_OF_GPU = 1 * GIB
TAKEN_OF_RAM = 4 * GIB


@dataclass(frozen=True)
class Pc:
    """The memory of one node: of its GPU, or of the PC if it computes on the CPU."""

    kind: Literal["gpu", "ram"]
    total_bytes: int

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
    """Give each PC in turn as many blocks as fit. One model may take less on one PC than on another, where it is quantized."""
    shares, start, num_blocks = [], 0, 0
    for pc, needs in pcs:
        num_blocks = needs.num_blocks
        end = min(start + blocks_that_fit(pc.free_bytes, needs), num_blocks)
        shares.append(Share(pc, start, end))
        start = end
    return Plan(tuple(shares), range(start, num_blocks))


def pcs_needed(needs: Needs, pc: Pc, num_blocks: int | None = None) -> int | None:
    """How many PCs like `pc` hold `num_blocks` blocks (default: all); None if it cannot hold a single one."""
    fitting = blocks_that_fit(pc.free_bytes, needs)
    return -(-(needs.num_blocks if num_blocks is None else num_blocks) // fitting) if fitting else None


def parse_size(text: str) -> int:
    """Bytes of memory written as 12GiB, 12GB or 12; a GB of memory is a GiB, as it is sold. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(g|m)(?:i?b)?)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * (2**20 if (found[2] or "g").lower() == "m" else GIB)) if found else 0
    if size <= 0:
        raise UserError(f"{text!r} is no size of memory. Write it as 12GiB.")
    return size
