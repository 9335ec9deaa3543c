"""A p2pd that is ended by somebody else: its node and its API end at once and say so."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
import torch
from conftest import connect, disconnect
from free_ports import free_port

from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


# Of its last second a test on a busy PC may hear nothing.
API = """
from petals_win.cli import api
api._LAST_WORDS_S = 5.0
from petals_win.cli.main import main
main()
"""


def kill_daemon(pid: int) -> psutil.Process:
    (daemon,) = [child for child in psutil.Process(pid).children(recursive=True) if child.name().startswith("p2pd")]
    daemon.kill()
    return daemon


def test_a_node_ends_with_it(checkpoint):
    with LocalSwarm(str(checkpoint("llama", **TINY)), ["0:2"]) as swarm:
        swarm.wait_until_serving()
        (node,) = swarm.nodes
        daemon = kill_daemon(node.child.pid)
        assert node.child.wait(30) == 1
        assert not daemon.is_running()
        failure = node.failure() or ""
        assert "p2pd has ended" in failure and "0:2" in failure and "Traceback" not in failure


def test_a_node_ends_with_it_while_it_loads(checkpoint):
    with LocalSwarm(str(checkpoint("llama", **TINY)), ["0:2"]) as swarm:
        (node,) = swarm.nodes  # has joined
        kill_daemon(node.child.pid)
        assert node.child.wait(30) == 1
        assert "p2pd" in (node.failure() or "")


def test_a_client_gets_an_exception(swarm):
    remote = connect(swarm, DEFAULT_MODEL, max_retries=None)
    try:
        ids = torch.tensor([[1, 2, 3]])
        remote.generate(ids, max_new_tokens=1, do_sample=False)
        lost = remote.blocks.sequence_manager.dht.lost
        psutil.Process(remote.blocks.sequence_manager.dht._node.p2p._child.pid).kill()
        lost.result(30)
        began = time.monotonic()
        with pytest.raises(Exception, match="p2pd"):
            remote.generate(ids, max_new_tokens=1, do_sample=False)
        assert time.monotonic() - began < 20
    finally:
        disconnect(remote)


def test_the_api_says_so_and_ends(swarm):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", API, "api", "--model", DEFAULT_MODEL, "--port", str(port)]
    api = subprocess.Popen(
        [*command, "--peers", swarm.peers[0]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    with httpx.Client(timeout=60, trust_env=False) as http:
        try:
            assert api.stdout is not None and url in api.stdout.readline()
            assert http.get(f"{url}/ready").status_code == 200
            answers, story = [], [{"role": "user", "content": "Tell me a long story."}]

            def ask() -> None:
                body = {"model": DEFAULT_MODEL, "messages": story, "max_tokens": 1000, "temperature": 0}
                with http.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as answer:
                    for line in answer.iter_lines():
                        answers.append(line)
                        if len(answers) == 4:
                            answering.set()

            answering = threading.Event()
            asking = threading.Thread(target=ask)
            asking.start()
            assert answering.wait(60)
            kill_daemon(api.pid)
            seen, until = None, time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    seen = http.get(f"{url}/ready")
                except httpx.TransportError:
                    break
                if seen.status_code == 503:
                    break
            assert seen is not None and seen.status_code == 503 and "p2pd has ended" in seen.json()["detail"]
            asking.join(30)
            assert not asking.is_alive() and any("p2pd" in line for line in answers), answers[-4:]
            _, said = api.communicate(timeout=30)
            assert api.returncode == 1
            assert "petals-win: The peer-to-peer daemon p2pd has ended" in said and "Traceback" not in said
        finally:
            api.kill()
