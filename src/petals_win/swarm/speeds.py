"""About how fast one answer comes, told from bytes alone: for each token a PC reads the weights that it computes with once.

    seconds of a token = for each PC (bytes read / rate + a little for each block + a way to it) + bytes of the head / rate

Knows what is assumed where nothing has been measured. Does not know this PC's processor, which span/rates.py measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from petals_win.span.needs import Needs
from petals_win.span.quantized_linear import Quant
from petals_win.swarm.cards import slowest_with
from petals_win.swarm.planner import Pc, Plan, make_plan, pcs_needed

# Assumptions, since nothing has run on a card of ours yet. Of what its maker publishes a card reaches this part, by how weights
# are kept; and between two operations it waits for the next one.
OF_A_CARD: Mapping[Quant, float] = {"none": 0.7, "int4": 0.5, "nf4": 0.5, "int8": 0.25}
CARD_BLOCK_SECONDS = 0.0003
# Of two channels of a processor's memory our kernels reached this part on the one machine where that was compared.
OF_RAM: Mapping[Quant, float] = {"none": 0.8, "int4": 0.6}
# To the next PC: a cable, and the programs at its two ends. By Wi-Fi it may be several times as long.
HOP_SECONDS = 0.002


@dataclass(frozen=True)
class Rate:
    """Bytes of weights that a PC reads in a second while it computes with them, and what a block takes beside, in seconds."""

    bytes_per_s: float
    block_seconds: float = 0.0


def rate_of(pc: Pc, quant: Quant, processor: Mapping[Quant, float]) -> Rate | None:
    """Of a PC whose weights are kept so; None: it does not compute with such weights, or no such card is known.

    `processor`: bytes per second of the CPUs of all PCs, by how weights are kept.
    """
    if pc.kind == "ram":
        return Rate(processor[quant]) if quant in processor else None
    card = pc.card or slowest_with(pc.total_bytes)
    return None if card is None else Rate(OF_A_CARD[quant] * 1e9 * card.gb_per_s, CARD_BLOCK_SECONDS)


def processor_of(gb_per_s: float) -> dict[Quant, float]:
    """The rates of a processor whose memory gives so many 10^9 bytes per second."""
    return {quant: part * 1e9 * gb_per_s for quant, part in OF_RAM.items()}


def share_seconds(needs: Needs, start: int, end: int, rate: Rate) -> float:
    """What a token takes at a PC with the blocks [start, end), and on its way there."""
    return HOP_SECONDS + sum(needs.read_bytes[start:end]) / rate.bytes_per_s + (end - start) * rate.block_seconds


@dataclass(frozen=True)
class Prediction:
    """Seconds of a token at each PC of a plan, and in all; None where nothing can be told, or a PC has no blocks."""

    by_pc: tuple[float | None, ...]
    token_seconds: float | None


def predict(
    plan: Plan, needs: Sequence[Needs], quants: Sequence[Quant], processor: Mapping[Quant, float]
) -> Prediction:
    """With one answer at a time. `needs` and `quants` are those of the plan's PCs, of which there is at least one.

    The PC that asks computes the head on its CPU, in 16 bits.
    """
    by_pc: list[float | None] = []
    for share, needed, quant in zip(plan.shares, needs, quants, strict=True):
        rate = rate_of(share.pc, quant, processor) if share.start < share.end else None
        by_pc.append(None if rate is None else share_seconds(needed, share.start, share.end, rate))
    told = [seconds for seconds in by_pc if seconds is not None]
    if plan.missing or len(told) < sum(share.start < share.end for share in plan.shares):
        return Prediction(tuple(by_pc), None)
    return Prediction(tuple(by_pc), sum(told) + needs[0].head_bytes / processor["none"])


@dataclass(frozen=True)
class Alike:
    """PCs of one kind that hold a model: how many, what the fullest has of weights and caches, and what a token takes."""

    count: int
    most_bytes: int
    token_seconds: float


def alike(pc: Pc, needs: Needs, quant: Quant, processor: Mapping[Quant, float]) -> Alike | None:
    """As few PCs like `pc` as hold the model; None: however many there are, they do not, or do not compute with such weights."""
    count = pcs_needed(needs, pc)
    if count is None or rate_of(pc, quant, processor) is None:
        return None
    plan = make_plan([(pc, needs)] * count)
    most = max(
        sum(needs.block_bytes[share.start : share.end]) + (share.end - share.start) * needs.cache_bytes
        for share in plan.shares
    )
    quants: list[Quant] = [quant] * count
    seconds = predict(plan, [needs] * count, quants, processor).token_seconds
    assert seconds is not None
    return Alike(count, most, seconds)
