"""What is special about a 70B: blocks of its true shapes, of which a PC holds few, and 80 of them on many PCs that come and go."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import connect, disconnect
from nodes_here import NodeHere, node_here, without_uvloop
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from petals_win.node import container
from petals_win.span.speed import SpanSpeed

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, CONTEXT = 80, 128
TINY = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
)
PROMPT = torch.tensor([[1, 40, 7, 300, 22, 5, 9, 41, 8, 100, 63, 12]])
GREEDY = dict(max_new_tokens=80, min_new_tokens=80, do_sample=False)
SLOW = SpanSpeed(inference_rps=10.0, forward_rps=100.0)  # less than any PC has
SECONDS = 100.0  # for an answer to go on, and for a node to move
GO_ON = 15  # tokens between two events


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_blocks_of_the_true_shapes(capsys):
    """The short form of scripts/seventy-b: two nodes in 16 bits and one in int4, exactness and memory beside the plan."""
    command = [sys.executable, "-X", "utf8", ROOT / "scripts" / "seventy_b.py", "--device", "cpu", "--json"]
    command += ["--short", "--quants", "none", "int4"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=580)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print("", *found, sep="\n")
    assert [(each["quant"], each["where"], each["wrong"]) for each in found] == [
        ("none", "nodes", []),
        ("int4", "nodes", []),
    ], done.stderr
    assert 0 < found[0]["off_in_16_bits"] < 0.1 < 10 * found[1]["off"], "else the bounds would say nothing"


class Writer(threading.Thread):
    """Has the same text written again and again, until it is told to stop."""

    def __init__(self, generate: Callable[[BaseStreamer], torch.Tensor]) -> None:
        super().__init__(daemon=True)
        self._generate = generate
        self._enough = threading.Event()
        self.texts: list[torch.Tensor] = []
        self.error: Exception | None = None
        self.tokens = 0

    def run(self) -> None:
        try:
            while not self._enough.is_set():
                self.texts.append(self._generate(self))  # pyright: ignore[reportArgumentType]
        except Exception as e:
            self.error = e

    def put(self, _value: torch.Tensor) -> None:  # as transformers' streamers are told of tokens
        self.tokens += 1

    def end(self) -> None:
        pass

    def goes_on(self) -> None:
        """Wait for some more tokens, so that what comes next happens in the middle of a text."""
        wanted, deadline = self.tokens + GO_ON, time.monotonic() + SECONDS
        while self.tokens < wanted:
            if self.error is not None:
                raise self.error
            assert time.monotonic() < deadline, "no token comes any more"
            time.sleep(0.05)

    def stop(self) -> None:
        self._enough.set()
        self.join(SECONDS)


@pytest.mark.timeout(280)
def test_eighty_blocks_on_ten_nodes_that_come_and_go_and_move(checkpoint):
    """Nodes join and leave, and one moves to other blocks, while a text is written again and again, the same one each time."""
    folder = checkpoint("llama", **TINY)
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(PROMPT, **GREEDY)
    with ExitStack() as ends:
        ends.enter_context(without_uvloop())
        peers: list[str] = []

        def join(blocks: str | None, **settings: object) -> NodeHere:
            node = node_here(folder, peers[:1], block_indices=blocks, **settings)
            ends.callback(node.end)
            peers.append(node.peer)
            return node

        # It chooses its blocks, and looks every half second on average whether others are better.
        moving = join(None, num_blocks=16, mean_block_selection_delay=0.0, mean_balance_check_period=0.5)
        assert blocks_of(moving) == "0:16"
        first = [join(blocks) for blocks in ("16:32", "32:48", "48:64")]
        with mock.patch.object(container, "measure_speed", return_value=SLOW):
            slow = join("64:80")
        remote = connect(SimpleNamespace(peers=peers[:1]), str(folder), update_period=1)
        ends.callback(disconnect, remote)
        writer = Writer(lambda streamer: remote.generate(PROMPT, streamer=streamer, **GREEDY))
        writer.start()
        ends.callback(writer.stop)
        writer.goes_on()

        join("0:16")  # so that the first one is free to help the slow one
        until(lambda: blocks_of(moving) == "64:80")
        writer.goes_on()
        slow.end()
        writer.goes_on()
        for blocks in ("16:40", "40:64", "0:8", "8:16"):
            join(blocks)
            writer.goes_on()
        assert len(peers) == 10
        for node in first:
            node.end()
            writer.goes_on()
        writer.stop()
        assert writer.error is None
        assert len(writer.texts) >= 2 and all(torch.equal(text, expected) for text in writer.texts)


def blocks_of(node: NodeHere) -> str | None:
    served = node.server.container
    return None if served is None else served.blocks


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
