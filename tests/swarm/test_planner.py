"""What the planner tells of well-known models, against arithmetic on their published shapes, and how it shares blocks out."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from petals_win.cli.main import app
from petals_win.errors import UserError
from petals_win.span import rates
from petals_win.span.needs import Needs, blocks_that_fit, needs_of
from petals_win.swarm.known_models import KNOWN_MODELS, find_known_model
from petals_win.swarm.planner import GIB, Pc, make_plan, parse_size, pcs_needed

LLAMA_70B = "meta-llama/Llama-2-70b-hf"


def needs(num_blocks: int = 10, block_bytes: int = GIB) -> Needs:
    return Needs((block_bytes,) * num_blocks, (0,) * num_blocks, cache_tokens=4096, outside_bytes=0)


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """Measuring it takes a second each time."""
    monkeypatch.setattr(rates, "processor_rates", lambda: {"none": 40e9, "int4": 30e9})


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def together(*places: int) -> Needs:
    """A GiB each, and no cut but at these places."""
    blocks = places[-1]
    return Needs((GIB,) * blocks, (0,) * blocks, cache_tokens=4096, outside_bytes=0, places=places)


def gpus(*sizes: int) -> list[Pc]:
    return [Pc("gpu", size * GIB) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "shares", "missing"),
    [
        ((8, 16), [(0, 4), (4, 10)], 0),
        ((9, 6), [(4, 10), (0, 4)], 0),  # in this order the second one would have no room for what is left
        ((6, 6, 6), [(0, 4), (4, 4), (4, 4)], 6),
        ((16, 16), [(0, 10), (10, 10)], 0),
    ],
)
def test_blocks_that_stay_together(sizes, shares, missing):
    needed = together(0, 1, 2, 3, 4, 10)
    made = make_plan([(pc, needed) for pc in gpus(*sizes)])
    found = [(share.start, share.end) for share in made.shares]
    assert found == shares and len(made.missing) == missing


def test_pcs_for_blocks_that_stay_together():
    needed = together(0, 1, 2, 3, 4, 10)
    assert [pcs_needed(needed, pc) for pc in gpus(16, 9, 6)] == [1, 2, None]
    assert pcs_needed(needed, gpus(9)[0], 6) == 1


# Billions of parameters as their makers publish them.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-2-7b-hf", 6.74),
        ("meta-llama/Llama-2-13b-hf", 13.02),
        (LLAMA_70B, 68.98),
        ("meta-llama/Meta-Llama-3-8B", 8.03),
        ("meta-llama/Meta-Llama-3-70B", 70.55),
        ("mistralai/Mistral-7B-v0.1", 7.24),
        ("Qwen/Qwen3-32B", 32.76),
        ("openai/gpt-oss-20b", 20.91),
        ("openai/gpt-oss-120b", 116.83),
        ("zai-org/GLM-4.5-Air", 106.88),  # without the layer that guesses ahead
    ],
)
def test_known_models_have_the_published_size(name, billions):
    known = find_known_model(name)
    assert known is not None
    found = needs_of(known.config(), torch.float16)
    assert round((sum(found.block_bytes) + found.outside_bytes) / 2 / 1e9, 2) == billions


def test_a_quantized_block_takes_what_its_layout_says():
    known = find_known_model(LLAMA_70B)
    assert known is not None
    linear = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    rows = 2 * 8192 + 2 * 1024 + 2 * 28672 + 8192
    norms = 2 * 8192 * 2
    config = known.config()
    assert needs_of(config, torch.float16, "int8").block_bytes[0] == linear + 4 * rows + norms
    nf4 = needs_of(config, torch.float16, "nf4")
    assert nf4.block_bytes[0] == linear // 2 + linear // 64 + 4 * (linear // 64 // 256) + norms
    # A scale and a zero of 16 bits for each 32 weights.
    assert needs_of(config, torch.float16, "int4").block_bytes[0] == linear // 2 + 4 * (linear // 32) + norms
    # What is outside of the blocks and the caches stay as they are: 8 of 64 heads are kept, for 128 values each, twice.
    assert nf4.cache_bytes_per_token[0] == 2 * 8 * 128 * 2
    assert nf4.outside_bytes == needs_of(config, torch.float16).outside_bytes


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-13b-chat-hf", "meta-llama/Llama-3.3-70B-Instruct"])
def test_ids_of_one_family_are_known(name):
    assert find_known_model(name) is not None


def test_an_id_that_only_looks_alike_is_not_known():
    assert find_known_model("somebody/Llama-2-13b-hf") is None


def test_each_pc_gets_what_fits_in_order():
    # 11 GiB free of 12, a tenth spared: 9 blocks of 1 GiB; then the one that is left; then none.
    made = make_plan([(pc, needs(10)) for pc in (Pc("gpu", 12 * GIB), Pc("ram", 16 * GIB), Pc("gpu", 24 * GIB))])
    assert [(share.start, share.end) for share in made.shares] == [(0, 9), (9, 10), (10, 10)]
    assert not made.missing


def test_a_pc_that_quantizes_holds_more():
    made = make_plan([(Pc("gpu", 12 * GIB), needs(30, GIB // 4)), (Pc("ram", 15 * GIB), needs(30))])
    assert [(share.start, share.end) for share in made.shares] == [(0, 30), (30, 30)]
    made = make_plan([(Pc("ram", 15 * GIB), needs(30)), (Pc("gpu", 12 * GIB), needs(30, GIB // 4))])
    assert [(share.start, share.end) for share in made.shares] == [(0, 9), (9, 30)]


def test_what_is_missing_is_said():
    made = make_plan([(pc, needs(30)) for pc in (Pc("gpu", 12 * GIB), Pc("gpu", GIB), Pc("ram", 8 * GIB))])
    assert [(share.start, share.end) for share in made.shares] == [(0, 9), (9, 9), (9, 12)]
    assert made.missing == range(12, 30)


def test_the_cache_counts():
    small = Needs((GIB,) * 10, (GIB // 4096,) * 10, cache_tokens=4096, outside_bytes=0)
    assert blocks_that_fit(10 * GIB, needs(10)) == 9
    assert blocks_that_fit(10 * GIB, small) == 4


def test_smallest_number_of_pcs():
    assert pcs_needed(needs(10), Pc("gpu", 12 * GIB)) == 2
    assert pcs_needed(needs(9), Pc("gpu", 12 * GIB)) == 1
    assert pcs_needed(needs(9), Pc("gpu", GIB)) is None


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * GIB), ("12", 12 * GIB), ("512 MB", GIB // 2), ("1.5g", 3 * GIB // 2)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-3", "0", "12TiB", "much", "12 GiB GiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="Write it as 12GiB"):
        parse_size(text)


def test_three_pcs_of_12_gib_hold_60_blocks_of_a_70b_in_nf4():
    done = invoke("--model", LLAMA_70B, "--quant", "nf4", *["--gpu", "12GiB"] * 3)
    assert done.exit_code == 0
    assert re.search(r"PC 3  GPU +12 GiB +nf4 +421 MiB a block +blocks 40:60", done.output)
    assert "60:80 (20 of 80) have no place" in done.output and "Add 1 more PC with 12 GiB" in done.output


def test_the_same_as_json():
    done = invoke("--model", LLAMA_70B, "--json", "--gpu", "24", "--ram", "64")
    facts = json.loads(done.output)
    assert [(pc["quant"], pc["start"], pc["end"]) for pc in facts["pcs"]] == [("int4", 0, 36), ("none", 36, 68)]
    assert facts["missing"] == list(range(68, 80)) and facts["num_blocks"] == 80
    assert set(facts["sizes"]) == {"int4", "none"}
    assert facts["tokens_per_s"] is None


def test_how_fast_a_swarm_answers():
    """80 blocks of a 70B in int4 in RAM: 510 MiB each at 30 GB/s; one way there; the head at 40 GB/s."""
    arguments = ("--model", LLAMA_70B, "--quant", "int4", "--ram", "128")
    facts = json.loads(invoke(*arguments, "--json").output)
    expected = 80 * facts["sizes"]["int4"]["block_bytes"][0] / 30e9 + 0.002
    assert facts["pcs"][0]["token_seconds"] == pytest.approx(expected)
    assert 1 / facts["tokens_per_s"] == pytest.approx(expected + 2 * 8192 * 32000 / 40e9)
    shown = invoke(*arguments).output
    assert re.search(r"PC 1  RAM +128 GiB +int4 +510 MiB a block +blocks 0:80, about 1,428 ms a token", shown)
    assert "One answer comes at about 0.69 tokens/s." in shown and "30.0 GB/s in int4" in shown
    assert "Assumed, since nothing has been" not in shown, "there is no card"


def test_cards_may_be_named():
    slow, fast = (
        json.loads(invoke("--model", LLAMA_70B, "--json", "--gpu", "24", "--gpu", card).output)["pcs"]
        for card in ("24GiB", "RTX 4090")
    )
    assert slow[0] == fast[0] and slow[1]["token_seconds"] > fast[1]["token_seconds"]
    shown = invoke("--model", LLAMA_70B, "--gpu", "24", "--gpu", "RTX 4090").output
    assert "RTX 3090 936, RTX 4090 1008" in shown and "Assumed, since nothing has been measured on a card" in shown


def test_beside_cards_in_nf4_a_cpu_keeps_16_bits():
    facts = json.loads(invoke("--model", LLAMA_70B, "--json", "--quant", "nf4", "--gpu", "24", "--ram", "64").output)
    assert [pc["quant"] for pc in facts["pcs"]] == ["nf4", "none"]


def test_without_pcs_it_tells_the_smallest_set_ups():
    rows = json.loads(invoke("--json").output)["smallest"]
    assert {row["model"] for row in rows} == {known.name for known in KNOWN_MODELS}
    assert len(rows) == 4 * len(KNOWN_MODELS)
    (found,) = [row["pcs"] for row in rows if (row["model"], row["quant"]) == (LLAMA_70B, "nf4")]
    assert found == {"8GiB": 7, "12GiB": 4, "16GiB": 3, "24GiB": 2, "32GiB RAM": None, "64GiB RAM": None}
    (row,) = [row for row in rows if (row["model"], row["quant"]) == (LLAMA_70B, "int4")]
    assert row["pcs"]["64GiB RAM"] == 1 and row["tokens_per_s"]["64GiB RAM"] == pytest.approx(0.69, abs=0.01)
    shown = invoke().output
    assert all(known.name in shown for known in KNOWN_MODELS) and "not quantized" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "12GiB"], "Which model"),
        (["--model", LLAMA_70B, "--quant", "q4", "--gpu", "12"], "int4, nf4, int8, none"),
        (["--model", LLAMA_70B, "--gpu", "many"], "no size of memory"),
        (["--model", "./nowhere", "--gpu", "12"], "There is no file or folder"),
    ],
)
def test_wrong_arguments_are_explained(arguments, said):
    done = invoke(*arguments)
    assert isinstance(done.exception, UserError) and said in str(done.exception)


def test_keys_and_values_in_8_bits():
    """34 bytes for 32 numbers of 16 bits."""
    arguments = ("--model", LLAMA_70B, "--quant", "int4", "--gpu", "24", "--json")
    full, small = (
        json.loads(invoke(*arguments, *more).output)["sizes"]["int4"] for more in ((), ("--kv-cache-dtype", "int8"))
    )
    assert small["cache_bytes_per_token"][0] / full["cache_bytes_per_token"][0] == 34 / 64
    assert small["block_bytes"] == full["block_bytes"]
    for wrong, why in (
        (("--kv-cache-dtype", "fp8", "--model", LLAMA_70B), "auto or int8"),
        (("--kv-cache-dtype", "int8"), "as --model"),
    ):
        done = CliRunner().invoke(app, ["plan", *wrong])
        assert isinstance(done.exception, UserError) and why in str(done.exception)
