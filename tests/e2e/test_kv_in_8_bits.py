"""A node that keeps keys and values in 8 bits beside one that does not: the same answer but for rounding, and room for more tokens."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import torch
from by_itself import ByItself
from test_bad_input import assert_sentence, serve
from test_first_pc import BLOCKS, Client
from test_first_pc import folder as folder  # a fixture

from petals_win.client.session import SwarmBlocks
from petals_win.models.source import open_model
from petals_win.span.span import Span
from petals_win.swarm.state import read_state


@torch.inference_mode()
def test_beside_one_that_does_not(folder):
    source = open_model(str(folder))
    hidden = torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(1))
    right = Span.load(source, 0, BLOCKS).forward(hidden, 0, BLOCKS)
    with ExitStack() as stack:
        how = (("0:2",), ("2:4", "--kv-cache-dtype", "int8", "--peers", "-"))
        full, small = (stack.enter_context(ByItself("--model", str(folder), "--blocks", *each)) for each in how)
        small.tell(full.join())
        small.join()
        for node in (full, small):
            node.event("serving")
        with Client(folder, full.address) as client:
            manager = client.model.blocks.sequence_manager
            session = SwarmBlocks(manager).open(60)
            outputs = [session.submit(part).result() for part in hidden.split([40, 1, 1, 18], dim=1)]
            session.submit_close().result()
            off = (torch.cat(outputs, dim=1) - right).norm(dim=-1) / (right - hidden).norm(dim=-1)
            assert 0 < off.max() < 0.02
            peers = asyncio.run(read_state(manager.dht, source.swarm_name, BLOCKS)).peers
            left = {peer.peer_id: peer.cache_tokens_left for peer in peers}
            assert left[small.peer_id] > 2.5 * left[full.peer_id] > 0


def test_another_word_is_refused(folder):
    done = serve("--model", str(folder), "--kv-cache-dtype", "fp8")
    assert_sentence(done, "auto or int8, not in fp8")
