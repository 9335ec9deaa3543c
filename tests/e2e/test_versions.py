"""This version and the one before it, in one swarm of the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from by_itself import ByItself
from test_first_pc import GREEDY, PROMPT, Client, local_text
from test_first_pc import folder as folder  # a fixture

from petals_win.client.session import SwarmBlocks
from petals_win.daemon.binary import find_p2pd
from petals_win.upstream.build import this_checkout

BEFORE = "b31dbe05141a783394f6c171cf4a1f68b3f9cc95"
CLIENT = """
import json, sys, torch
from petals import AutoDistributedModelForCausalLM
folder, peer, prompt, greedy, routes = map(json.loads, sys.argv[1:])
for route in routes:
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=[peer], show_route=False, max_retries=6, allowed_servers=route
    )
    with torch.inference_mode():
        print("text:", model.generate(torch.tensor(prompt), **greedy)[0].tolist())
    model.blocks.sequence_manager.shutdown()
    model.blocks.sequence_manager.dht.shutdown()
"""


@pytest.fixture(scope="session")
def before() -> dict[str, str]:
    """What the environment needs to run the version before, built in build/ at the first time."""
    checkout = this_checkout()
    if not (checkout.root / ".git").exists():
        pytest.skip("the version before is in the repository's history, and this is a source archive without it")
    tree = checkout.root / "build" / f"version-{BEFORE[:12]}"
    daemon = {"PETALS_WIN_P2PD": str(find_p2pd().path)}
    if not (tree / "external" / "petals-main").exists():
        tree.mkdir(parents=True, exist_ok=True)
        archive = tree.with_suffix(".tar")
        done = subprocess.run(
            ["git", "archive", f"--output={archive}", BEFORE], cwd=checkout.root, capture_output=True, text=True
        )
        if done.returncode:
            pytest.fail(f"The history here lacks {BEFORE} ({done.stderr.strip()}): git fetch --unshallow gets it.")
        with tarfile.open(archive) as files:
            files.extractall(tree, filter="data")
        archive.unlink()
        environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
        subprocess.run(
            [sys.executable, "-m", "petals_win.cli.main", "patches", "build"], cwd=tree, env=environment, check=True
        )
    path = [tree / "src", tree / "external" / "petals-main", tree / "external" / "hivemind"]
    return {**daemon, "PYTHONPATH": os.pathsep.join(map(str, path))}


def texts_of_a_client_before(
    before: dict[str, str], folder: Path, peer: str, routes: list[list[str]]
) -> list[torch.Tensor]:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *map(json.dumps, (str(folder), peer, PROMPT.tolist(), GREEDY, routes))],
        env={**os.environ, **before},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("text: ") for line in done.stdout.splitlines() if line.startswith("text:")]
    return [torch.tensor([json.loads(line)]) for line in lines]


def last_outputs(client: Client, last: int | None) -> list[torch.Tensor]:
    """Of a prompt and a short step behind it, which the first node passes on, the last outputs that come back."""
    session = SwarmBlocks(client.model.blocks.sequence_manager).open(32)
    hidden = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    found = [session.submit(part, last=last).result() for part in hidden.split([15, 5], dim=1)]
    session.submit_close().result()
    return found


def test_the_version_before_is_another_one(before):
    done = subprocess.run(
        [sys.executable, "-c", "import petals.utils.dht as d, petals_win as w; print(d.__file__, w.__file__)"],
        env={**os.environ, **before},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"version-{BEFORE[:12]}" in file for file in done.stdout.split())


@torch.inference_mode()
def test_they_answer_together(before, folder):
    """A client of each version gets the text of one process over each route: nodes pass their outputs on to one another."""
    wanted = local_text(folder)
    with ExitStack() as stack:

        def start(program: dict[str, str] | None, *arguments: str) -> ByItself:
            return stack.enter_context(
                ByItself("--model", str(folder), "--blocks", *arguments, program=program, debug=True)
            )

        first = start(before, "0:2")
        others = [start(None, "0:2", "--peers", "-"), start(before, "2:4", "--peers", "-")]
        others.append(start(None, "2:4", "--peers", "-"))
        first.join()
        for node in others:
            node.tell(first.address)
        for node in others:
            node.join()
        for node in (first, *others):
            node.event("serving")
        now, last_before, last_now = others
        routes = [[a.peer_id, b.peer_id] for a in (first, now) for b in (last_before, last_now)]
        for route in routes:
            with Client(folder, now.address, allowed_servers=route) as client:
                assert client.peers() == {node.peer_id for node in (first, *others)}
                assert torch.equal(client.text(), wanted)
                for all_of_them, two in zip(last_outputs(client, None), last_outputs(client, 2), strict=True):
                    torch.testing.assert_close(two, all_of_them[:, -2:])
        for last in (last_before, last_now):
            pushed = [line for line in last.lines if "rpc_push(blocks=2:4" in line]
            for sender in (first, now):
                assert any(f"remote_peer=...{sender.peer_id[-6:]}" in line for line in pushed), last.lines[-20:]

        texts = texts_of_a_client_before(before, folder, first.address, routes)
        assert len(texts) == len(routes) and all(torch.equal(text, wanted) for text in texts)
