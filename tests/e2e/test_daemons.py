"""One swarm, two daemons: upstream's p2pd and ours, each as the first peer and as the one that joins."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from conftest import connect, disconnect

from petals_win.models.source import DEFAULT_MODEL, open_model
from petals_win.swarm.local import LocalSwarm
from petals_win.upstream.build import extract_daemon, this_checkout

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="upstream's daemon exists for Linux on x86_64 only",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("reference") / "p2pd"
    extract_daemon(this_checkout(), program)
    return program


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """What one process answers."""
    model = open_model(DEFAULT_MODEL).whole_model()
    with torch.inference_mode():
        return model.generate(prompt(), max_new_tokens=16, do_sample=False)


def prompt() -> torch.Tensor:
    return open_model(DEFAULT_MODEL).tokenizer()("My favourite animal is", return_tensors="pt")["input_ids"]


@torch.inference_mode()
@pytest.mark.parametrize("first, joiner", [("reference", "ours"), ("ours", "reference")])
def test_they_form_one_swarm(first, joiner, reference, expected, monkeypatch):
    def use(which: str) -> None:
        if which == "reference":
            monkeypatch.setenv("PETALS_WIN_P2PD", str(reference))
        else:
            monkeypatch.delenv("PETALS_WIN_P2PD", raising=False)

    use(first)
    with LocalSwarm(DEFAULT_MODEL, ["0:15"], options=["--quant", "none"]) as swarm:
        use(joiner)
        swarm.add_node("15:30")
        swarm.wait_until_serving()
        for client in (first, joiner):
            use(client)
            remote = connect(swarm, DEFAULT_MODEL)
            try:
                assert torch.equal(remote.generate(prompt(), max_new_tokens=16, do_sample=False), expected)
            finally:
                disconnect(remote)
