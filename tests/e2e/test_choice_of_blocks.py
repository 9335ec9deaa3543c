"""Nodes that choose their blocks themselves: as many as the plan says, where they are needed."""

from __future__ import annotations

import json
import queue
import sys
from contextlib import ExitStack

import torch

from petals_win.host.children import spawn
from petals_win.models.source import open_model
from petals_win.span.needs import blocks_that_fit, needs_of

NUM_BLOCKS, FITTING = 8, 5

# How much is free cannot be arranged on a real PC: the nodes are told.
NODE = """
import sys
import petals_win.host.memory as memory
free = int(sys.argv.pop(1))
memory.available_bytes = lambda device="cpu": free
from petals_win.cli.main import main
main()
"""


def start(stack: ExitStack, folder, free: int, *options: str):
    """A node, and the queue of its events."""
    events: queue.SimpleQueue[dict] = queue.SimpleQueue()
    command = [sys.executable, "-c", NODE, str(free), "serve", "--json", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--threads", "1", "--fresh", *options]
    child = spawn(command, on_line=lambda line: events.put(json.loads(line)) if line.startswith('{"event"') else None)
    stack.callback(child.stop)
    return events


def test_two_nodes_share_the_blocks_as_planned(checkpoint):
    folder = checkpoint("llama", vocab_size=64, hidden_size=64, num_hidden_layers=NUM_BLOCKS, num_attention_heads=4)
    needs = needs_of(open_model(str(folder)).config, torch.float32)
    free = int((FITTING + 0.5) * needs.served_block_bytes / 0.9)
    assert blocks_that_fit(free, needs) == FITTING
    with ExitStack() as stack:
        first = start(stack, folder, free)
        peers = first.get(timeout=120)["peers"]
        assert first.get(timeout=120) == {"event": "serving", "blocks": f"0:{FITTING}"}
        second = start(stack, folder, free, "--peers", peers[0])
        assert second.get(timeout=120)["event"] == "joined"
        start_block, end_block = map(int, second.get(timeout=120)["blocks"].split(":"))
        assert end_block - start_block == FITTING
        assert end_block == NUM_BLOCKS, "the blocks that nobody served have a place now"
