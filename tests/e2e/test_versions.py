"""This version and the one before it, in one swarm of the same model."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from by_itself import ByItself
from test_first_pc import PROMPT, Client, local_text
from test_first_pc import folder as folder  # a fixture

from petals_win.daemon.binary import find_p2pd
from petals_win.upstream.build import this_checkout

BEFORE = "b31dbe05141a783394f6c171cf4a1f68b3f9cc95"
CLIENT = """
import sys, torch
from petals import AutoDistributedModelForCausalLM
folder, peer, prompt = sys.argv[1], sys.argv[2], [int(token) for token in sys.argv[3].split(",")]
model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[peer], show_route=False, max_retries=3)
with torch.inference_mode():
    text = model.generate(torch.tensor([prompt]), **dict(max_new_tokens=8, min_new_tokens=8, do_sample=False))
print("text:", *text[0].tolist())
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


def text_of_a_client_before(before: dict[str, str], folder: Path, peer: str) -> torch.Tensor:
    prompt = ",".join(str(token) for token in PROMPT[0].tolist())
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(folder), peer, prompt],
        env={**os.environ, **before},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("text:")]
    return torch.tensor([[int(token) for token in line.split()[1:]]])


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
@pytest.mark.parametrize("first, second", [("before", "now"), ("now", "before"), ("now", "now")])
def test_they_answer_together(first, second, before, folder):
    """Nodes of both versions, and of this one alone, asked by clients of both; each passes its outputs on to the other."""
    programs = {"before": before, "now": None}
    wanted = local_text(folder)
    with (
        ByItself("--model", str(folder), "--blocks", "0:2", program=programs[first]) as one,
        ByItself("--model", str(folder), "--blocks", "2:4", "--peers", one.join(), program=programs[second]) as two,
    ):
        two.join()
        for node in (one, two):
            node.event("serving")
        with Client(folder, one.address) as client:
            assert client.peers() == {one.peer_id, two.peer_id}
            assert torch.equal(client.text(), wanted)
        assert torch.equal(text_of_a_client_before(before, folder, one.address), wanted)
