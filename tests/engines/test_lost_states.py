"""Of blocks with recurrent states and of ones with windows, an answer goes on right where a node is lost: its past is computed anew."""

from __future__ import annotations

import asyncio

import pytest
from nodes_here import nodes_here
from test_room import answer, chat, taken, use
from tiny_chat import tiny_chat_model

from petals_win.engines.base import Token


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_a_node_with_states_is_lost_in_the_middle_of_an_answer(tmp_path, family):
    folder = tiny_chat_model(tmp_path / "tiny", family, context=512, ends=0)
    with nodes_here(folder, ["0:4", "4:6", "4:6"]) as nodes:
        asked = chat(
            "A prompt that is longer than a page of tokens, so that some of it can be kept.",
            max_tokens=24,
            seed=1,
        )

        async def ask(engine):
            right, _ = await answer(engine, asked)
            text, count, lost = "", 0, None
            async for event in engine.generate(asked):
                if isinstance(event, Token):
                    text, count = text + event.text, count + 1
                if count == 8 and lost is None:
                    lost = next(node for node in nodes[1:] if taken(node))
                    nodes.remove(lost)
                    await asyncio.to_thread(lost.server.shutdown)
            assert lost is not None and text == right and len(set(text)) > 3

        use(folder, nodes, ask)
