"""Answers at once through real nodes: their steps travel together, and a line that is lost costs none of them its text."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path

from nodes_here import NodeHere, nodes_here
from test_room import answer, chat, use
from tiny_chat import tiny_chat_model

from petals_win.node.petals_rpc import TransformerConnectionHandler
from petals_win.swarm.lines import Line


def test_answers_at_once_share_lines_and_survive_their_loss(tmp_path: Path, monkeypatch):
    folder = tiny_chat_model(tmp_path / "tiny", "llama", context=512, ends=0)
    pushed, frames, lock = Counter(), Counter(), threading.Lock()
    take, write = TransformerConnectionHandler._take, Line._write

    def taking(rpc, session_id, request, sender) -> bool:
        with lock:
            pushed[b"pushed" in request.metadata] += 1
        return take(rpc, session_id, request, sender)

    def writing(line: Line) -> None:
        with lock:
            frames[len(line._waiting)] += 1
        write(line)

    monkeypatch.setattr(TransformerConnectionHandler, "_take", taking)
    monkeypatch.setattr(Line, "_write", writing)
    # Each with a seed of its own, so that they do not say the same.
    asked = [chat(f"Question {number}", max_tokens=100, temperature=1.0, seed=number) for number in range(6)]

    async def end_lines(node: NodeHere) -> None:
        assert node.server.container is not None
        node.server.container._rpc._lines.close()

    async def ask(engine):
        alone = [(await answer(engine, each))[0] for each in asked]
        assert pushed[False] and pushed[True]  # also of one session
        frames.clear()
        together = await asyncio.gather(*(answer(engine, each) for each in asked))
        assert [text for text, _ in together] == alone
        assert sum(frames.values()) < sum(size * count for size, count in frames.items())

        answering = [asyncio.create_task(answer(engine, each)) for each in asked]
        ended = 0
        for node in nodes * 3:
            before = pushed.total()
            while pushed.total() < before + 12 and not all(each.done() for each in answering):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(node.server.dht.call, end_lines(node), 5)
            ended += not all(each.done() for each in answering)
        assert [(await each)[0] for each in answering] == alone and ended

    with nodes_here(folder, ["0:2", "2:4"]) as nodes:
        use(folder, nodes, ask)
