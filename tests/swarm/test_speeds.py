"""How fast an answer comes, against arithmetic on bytes; and what this PC's processor reads, against what spans of its own take."""

from __future__ import annotations

import pytest
import torch

from petals_win.errors import UserError
from petals_win.kernels.library import kernels
from petals_win.span.needs import Needs, needs_of
from petals_win.span.rates import processor_rates
from petals_win.swarm.cards import CARDS, GIB, find_card, slowest_with
from petals_win.swarm.known_models import find_known_model
from petals_win.swarm.planner import Pc, make_plan, parse_gpu
from petals_win.swarm.speeds import (
    CARD_BLOCK_SECONDS,
    HOP_SECONDS,
    OF_A_CARD,
    alike,
    predict,
    processor_of,
)

PROCESSOR = {"none": 10e9, "int4": 8e9}


def needs(num_blocks: int = 10, read_bytes: int = GIB, head_bytes: int = 0) -> Needs:
    return Needs(
        (GIB,) * num_blocks,
        (0,) * num_blocks,
        cache_tokens=4096,
        outside_bytes=0,
        read_bytes=(read_bytes,) * num_blocks,
        head_bytes=head_bytes,
    )


def seconds(pcs: list[Pc], needed: Needs, quant="none") -> float | None:
    plan = make_plan([(pc, needed) for pc in pcs])
    return predict(plan, [needed] * len(pcs), [quant] * len(pcs), PROCESSOR).token_seconds


def test_a_token_reads_all_weights_once_and_goes_to_each_pc():
    assert seconds([Pc("ram", 64 * GIB)], needs(10)) == pytest.approx(10 * GIB / 10e9 + HOP_SECONDS)
    two = seconds([Pc("ram", 10 * GIB)] * 2, needs(10))  # five blocks each
    assert two == pytest.approx(10 * GIB / 10e9 + 2 * HOP_SECONDS)
    of_int4 = seconds([Pc("ram", 64 * GIB)], needs(10, head_bytes=GIB), "int4")
    assert of_int4 == pytest.approx(10 * GIB / 8e9 + GIB / 10e9 + HOP_SECONDS), "the head is not quantized"


def test_a_pc_without_blocks_costs_nothing():
    assert seconds([Pc("ram", 64 * GIB), Pc("ram", 64 * GIB)], needs(10)) == seconds([Pc("ram", 64 * GIB)], needs(10))


@pytest.mark.parametrize("quant", OF_A_CARD)
def test_a_card_reaches_the_part_that_is_assumed(quant):
    found = seconds([parse_gpu("NVIDIA GeForce RTX 3090")], needs(10), quant)
    assert found == pytest.approx(10 * GIB / (936e9 * OF_A_CARD[quant]) + 10 * CARD_BLOCK_SECONDS + HOP_SECONDS)


def test_nothing_is_said_of_what_cannot_be():
    assert seconds([Pc("ram", 8 * GIB)], needs(10)) is None, "blocks are missing"
    assert seconds([Pc("ram", 64 * GIB)], needs(10), "nf4") is None, "a CPU takes no nf4"
    assert seconds([Pc("gpu", 80 * GIB)], needs(10)) is None, "no such card is known"
    assert alike(Pc("ram", 64 * GIB), needs(10), "int8", PROCESSOR) is None


def test_the_fullest_of_pcs_that_are_alike():
    found = alike(Pc("ram", 10 * GIB), needs(8), "none", PROCESSOR)
    assert found is not None and (found.count, found.most_bytes) == (2, 5 * GIB)


def test_of_experts_only_those_count_that_a_token_goes_to():
    """gpt-oss-120b has 128 experts in a block, and a token goes to 4: of 117 billion parameters 5.1 are read, as OpenAI says."""
    known = find_known_model("openai/gpt-oss-120b")
    assert known is not None
    found = needs_of(known.config(), torch.bfloat16)
    expert = 2 * (2880 * 2 * 2880 + 2880 * 2880)
    assert found.block_bytes[0] - found.read_bytes[0] == 124 * expert
    # Of the embeddings a token reads one row; the biases of all experts are counted, which are next to nothing.
    assert (sum(found.read_bytes) + found.head_bytes) / 2 / 1e9 == pytest.approx(5.13, abs=0.05)
    dense = find_known_model("meta-llama/Llama-2-70b-hf")
    assert dense is not None
    found = needs_of(dense.config(), torch.float16, "int4")
    assert found.read_bytes == found.block_bytes and found.head_bytes == 2 * 8192 * 32000


def test_cards_by_name_and_by_size():
    assert find_card("rtx3060") is find_card("NVIDIA GeForce RTX 3060")
    assert find_card("RTX 4060 Ti") is not find_card("RTX 4060 Ti 16GB")
    assert find_card("GTX 970") is None
    assert [slowest_with(size * GIB).name for size in (12, 24, 30)] == [
        "RTX 3060",
        "RTX 3090",
        "RTX 5090",
    ]  # pyright: ignore[reportOptionalMemberAccess]
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert parse_gpu("RTX 5090").total_bytes == 32 * GIB
    assert parse_gpu("12GiB") == Pc("gpu", 12 * GIB)
    with pytest.raises(UserError, match="no size of memory.* no 'RTX 9999' is in the table"):
        parse_gpu("RTX 9999")


def test_the_rates_of_this_processor():
    """Whatever it is, it reads more than a disk and less than any memory of a PC; and int4 makes a weight's product cheaper."""
    rates = processor_rates()
    assert set(rates) == ({"none", "int4"} if kernels() is not None else {"none"})
    assert all(3e8 < rate < 1e12 for rate in rates.values())


def test_an_assumed_processor():
    assert processor_of(100) == {"none": 80e9, "int4": 60e9}
