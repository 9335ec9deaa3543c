"""A node that freezes, as a PC that goes to sleep does: the text goes on at another one, without a long gap."""

from __future__ import annotations

import time

import psutil
import pytest
import torch
from conftest import connect, disconnect, node_of
from transformers.generation.streamers import BaseStreamer

from petals_win.swarm.local import LocalNode, LocalSwarm

SMALL = dict(vocab_size=320, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
PROMPT = torch.tensor([[1, 40, 7, 300, 22, 5, 9, 41, 8, 100, 63, 12]])
GREEDY = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False)


class Watched(BaseStreamer):
    """Calls `action` after the prompt and `count` tokens, and keeps the times between two tokens."""

    def __init__(self, count: int, action):
        self.left, self.action = count + 1, action
        self.gaps, self.last = [], time.monotonic()

    def put(self, value):
        now = time.monotonic()
        self.gaps.append(now - self.last)
        self.last = now
        self.left -= 1
        if self.left == 0:
            self.action()

    def end(self):
        pass


def processes(node: LocalNode, with_p2pd: bool) -> list[psutil.Process]:
    process = psutil.Process(node.child.pid)
    return [process, *(process.children(recursive=True) if with_p2pd else [])]


@pytest.mark.alone
@pytest.mark.parametrize("with_p2pd", [False, True], ids=["its Python", "with its p2pd"])
@torch.inference_mode()
def test_a_node_freezes_in_the_middle_of_a_text(checkpoint, with_p2pd):
    folder = checkpoint("llama", **SMALL)
    with LocalSwarm(str(folder), ["0:4", "0:4"]) as swarm:
        swarm.wait_until_serving()
        remote = connect(swarm, str(folder))
        frozen: list[psutil.Process] = []
        try:
            began = time.monotonic()
            undisturbed = remote.generate(PROMPT, **GREEDY)
            usual = time.monotonic() - began  # the past is computed anew, which takes its time on a slow PC
            with remote.inference_session(max_length=64) as session:

                def freeze_the_node_in_use():
                    ((used, _start, _end),) = session.remote.route
                    frozen.extend(processes(node_of(swarm, used), with_p2pd))
                    for process in frozen:
                        process.suspend()

                watched = Watched(12, freeze_the_node_in_use)
                text = remote.generate(PROMPT, session=session, streamer=watched, **GREEDY)
            assert frozen and torch.equal(text, undisturbed)
            assert max(watched.gaps) < 6 + usual, watched.gaps

            began = time.monotonic()
            assert torch.equal(remote.generate(PROMPT, **GREEDY), undisturbed)
            assert time.monotonic() - began < 6 + usual, "the next question does not go there"

            # Who has never asked before, and finds the frozen node by its announcement, is not held up for long either.
            # It joins by the other node's address: a frozen one cannot let anybody in.
            awake = next(node for node in swarm.nodes if node.child.pid != frozen[0].pid)
            settings = dict(initial_peers=awake.addresses[:1], daemon_startup_timeout=30)
            other = connect(swarm, str(folder), **settings) if not with_p2pd else None
            if other is not None:
                try:
                    began = time.monotonic()
                    assert torch.equal(other.generate(PROMPT, **GREEDY), undisturbed)
                    assert time.monotonic() - began < 30
                finally:
                    disconnect(other)
        finally:
            for process in frozen:
                process.resume()
            disconnect(remote)
