"""The first PC of a swarm, killed and started again by the same command: the same address, the same swarm."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from by_itself import SECONDS, ByItself
from petals import AutoDistributedModelForCausalLM
from test_bad_input import assert_sentence, run
from transformers import AutoModelForCausalLM

from petals_win.models.source import open_model
from petals_win.swarm.identity import hold_identity, new_key
from petals_win.swarm.state import read_state

BLOCKS = 4
PROMPT = torch.tensor([[1, 5, 9, 200, 7, 31]])
GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.fixture
def folder(checkpoint) -> Path:
    return checkpoint(
        "llama",
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=128,
    )


def local_text(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval().generate(PROMPT, **GREEDY)


class Client:
    """A model whose blocks are in the swarm of `peer`."""

    def __init__(self, folder: Path, peer: str, **settings):
        self._name = open_model(str(folder)).swarm_name
        self.model = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=[peer], show_route=False, max_retries=3, **settings
        ).eval()

    def peers(self) -> set[str]:
        """Ids of the nodes that are online."""
        dht = self.model.blocks.sequence_manager.dht
        state = asyncio.run(read_state(dht, self._name, BLOCKS))
        return {peer.peer_id for peer in state.peers if peer.online}

    def text(self) -> torch.Tensor:
        return self.model.generate(PROMPT, **GREEDY)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        manager = self.model.blocks.sequence_manager
        manager.shutdown()
        manager.dht.shutdown()


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def members_known(home: Path) -> set[str]:
    files = list(home.glob("data/nodes/*/*/members.json"))
    return set(json.loads(files[0].read_text())) if files else set()


@torch.inference_mode()
def test_it_comes_back_into_its_swarm(folder, tmp_path):
    wanted = local_text(folder)
    with ExitStack() as stack:

        def start(pc: str, *arguments: str) -> ByItself:
            return stack.enter_context(ByItself("--model", str(folder), *arguments, home=tmp_path / pc))

        first = start("a", "--blocks", "0:2")
        others = [start(pc, "--blocks", "2:4", "--peers", "-") for pc in ("b", "c")]
        line = ["--peers", first.join()]
        for node in others:
            node.tell(first.address)
        for node in others:
            node.join()
        for node in (first, *others):
            node.event("serving")
        wait_until(lambda: members_known(tmp_path / "a") == {node.peer_id for node in others})

        first.kill()
        again = start("a", "--blocks", "0:2")
        assert again.join() == first.address
        last = start("d", "--blocks", "0:2", *line)
        last.join()
        with Client(folder, first.address) as client:
            everybody = {node.peer_id for node in (first, *others, last)}
            wait_until(lambda: client.peers() == everybody)
            assert torch.equal(client.text(), wanted)


def test_a_damaged_key_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path))
    with hold_identity(open_model(str(folder)).dht_prefix, {}, host="127.0.0.1") as identity:
        identity.key.write_bytes(new_key()[:9])
    done = run("serve", "--model", str(folder), "--host", "127.0.0.1")
    assert_sentence(
        done, str(identity.key), "The identity file is damaged. Delete it: the next start makes a new one."
    )


def retrained(folder: Path, to: Path) -> Path:
    """Another revision: the same name, configuration and tensors, other values."""
    shutil.copytree(folder, to)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(to)
    return to


@torch.inference_mode()
def test_a_renamed_folder_is_in_the_same_swarm_and_another_revision_is_not(folder, tmp_path):
    wanted = local_text(folder)
    renamed = shutil.copytree(folder, tmp_path / "My Model v1.0")
    revision = retrained(folder, tmp_path / "other" / folder.name.upper())
    with (
        ByItself("--model", str(folder), "--blocks", "0:2") as first,
        ByItself("--model", str(renamed), "--blocks", "2:4", "--peers", "-") as second,
    ):
        second.tell(first.join())
        second.join()
        for node in (first, second):
            node.event("serving")
        for one in (folder, renamed):
            with Client(one, first.address) as client:
                assert client.peers() == {first.peer_id, second.peer_id}
                assert torch.equal(client.text(), wanted)
                inputs = torch.randn(1, 4, 64)
                assert torch.isfinite(client.model(inputs_embeds=inputs).logits).all()

        ids = [open_model(str(one)).content_id for one in (folder, revision)]
        for command, more in (
            ("serve", ["--blocks", "0:2", "--host", "127.0.0.1", "--fresh"]),
            ("api", ["--port", "0"]),
        ):
            done = run(command, "--model", str(revision), "--peers", first.address, *more)
            assert_sentence(done, *ids, "another revision", "Put the same files on all PCs")
