"""What the plan says of a model's bytes, against what a span and its caches take of a real process's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from petals_win.errors import UserError
from petals_win.models.source import open_model
from petals_win.span import needs
from petals_win.span.needs import choose_num_blocks, needs_of

BLOCKS, TOKENS = 10, 8192

# One block is loaded first, so that what torch takes once is not counted; nor is what the allocator keeps of plain weights
# that were freed when they had been packed: it is a few layers' worth, however many there are, and the next one to ask gets it.
MEASURE = f"""
import ctypes, gc, json, sys
import torch
from petals_win.host.memory import own_bytes
from petals_win.models.source import open_model
from petals_win.span import layouts
from petals_win.span.span import Span

torch.set_num_threads(1)
# Else layouts are tried out with weights of their own, whose memory Windows gives back when it likes.
layouts.fastest_layout = lambda *_: "by rows"
source = open_model(sys.argv[1])
def settled():
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return own_bytes()
first = Span.load(source, 0, 1)
first.step(first.open(1, 8), torch.zeros(1, 4, first.row.width, dtype=first.dtype))
before = settled()
span = Span.load(source, 1, {BLOCKS} + 1)
loaded = settled()
session = span.open(1, {TOKENS})
for layer in session.cache.layers:
    layer.keys.zero_(), layer.values.zero_()
cached = settled()
print(json.dumps({{"weights": loaded - before, "cache": cached - loaded}}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama of 11 blocks of 50 MiB."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=BLOCKS + 1,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_a_loaded_span_takes_what_the_plan_says(checkpoint):
    source = open_model(str(checkpoint))
    planned = needs_of(source.config, source.dtype)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint)], capture_output=True, text=True, timeout=240, check=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["weights"] == pytest.approx(sum(planned.block_bytes[1:]), rel=0.05)
    assert measured["cache"] == pytest.approx(TOKENS * sum(planned.cache_bytes_per_token[1:]), rel=0.05)


def test_a_node_that_can_hold_no_block_says_what_one_takes(checkpoint, monkeypatch):
    source = open_model(str(checkpoint))
    planned = needs_of(source.config, source.dtype)
    monkeypatch.setattr(needs, "available_bytes", lambda device: planned.served_block_bytes)
    with pytest.raises(UserError, match=r"112 MiB free on cpu.* 0 blocks fit"):
        choose_num_blocks(planned, torch.device("cpu"))
    monkeypatch.setattr(needs, "available_bytes", lambda device: int(2.5 * planned.served_block_bytes))
    assert choose_num_blocks(planned, torch.device("cpu")) == 2
