"""Swarms of real nodes on loopback, each node a process with its p2pd, and the models that they serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from petals import AutoDistributedModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalNode, LocalSwarm

torch.set_num_threads(1)


def connect(swarm: LocalSwarm, model: str, **settings):
    """A client of its own, with its own DHT peer. End it by `disconnect`."""
    settings = dict(max_retries=5, initial_peers=swarm.peers) | settings
    return AutoDistributedModelForCausalLM.from_pretrained(model, show_route=False, **settings).eval()


def disconnect(model) -> None:
    model.blocks.sequence_manager.shutdown()
    model.blocks.sequence_manager.dht.shutdown()


def node_of(swarm: LocalSwarm, peer_id: object) -> LocalNode:
    return next(node for node in swarm.nodes if node.addresses[0].endswith(str(peer_id)))


@pytest.fixture(scope="session")
def remote(swarm: LocalSwarm):
    model = connect(swarm, DEFAULT_MODEL)
    yield model
    disconnect(model)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a randomly initialized model of the given type and dimensions."""

    def make(model_type: str, **dimensions) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **dimensions)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # the default spread is so small that every token looks alike
                if parameter.ndim > 1:
                    parameter.mul_(3)
        folder = tmp_path / model_type
        model.save_pretrained(folder)
        return folder

    return make
