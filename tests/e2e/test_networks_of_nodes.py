"""Nodes beyond loopback: the line for the next PC works where there are virtual adapters, and what a daemon offers to strangers."""

from __future__ import annotations

import json
import queue
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from conftest import connect, disconnect
from p2pd.p2pd_networks import Networks, NoNetworks

from petals_win.host.children import Child, spawn
from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
COMMAND = [sys.executable, "-m", "petals_win.cli.main"]


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable]:
    """Starts `petals-win serve` with arguments; returns the process and the first output that the pattern matches."""
    children: list[Child] = []

    def start(
        *arguments: str, prefix: tuple[str, ...] = (), until: str, number: int = 0
    ) -> tuple[Child, re.Match[str]]:
        lines: list[str] = []
        seen = threading.Event()

        def take(line: str) -> None:
            lines.append(line)
            if re.search(until, "\n".join(lines)):
                seen.set()

        home = ["env", f"PETALS_WIN_HOME={tmp_path / f'home-{len(children)}'}"] if sys.platform != "win32" else []
        child = spawn([*prefix, *home, *COMMAND, "serve", *arguments], on_line=take)
        children.append(child)
        while not seen.wait(0.2):
            assert child.returncode is None, child.output_tail()
        found = re.search(until, "\n".join(lines))
        assert found is not None
        return child, found

    yield start
    for child in reversed(children):
        child.stop()


@pytest.fixture
def networks() -> Iterator[Networks]:
    try:
        made = Networks()
    except NoNetworks as e:
        pytest.skip(str(e))
    with made:
        yield made


def test_the_join_line_names_the_address_that_others_reach(networks, serve, checkpoint):
    """A PC at home with Docker's bridge and a link-local adapter beside its cable, and the next PC, which types the line."""
    model = str(checkpoint("llama", **TINY))
    try:
        first, second, elsewhere = (networks.namespace(name) for name in ("first", "second", "elsewhere"))
        networks.cable(first, "169.254.7.7/16", elsewhere, "169.254.7.8/16")
        networks.cable(first, "172.17.0.1/16", elsewhere, "172.17.0.2/16")
        networks.cable(first, "192.168.1.20/24", second, "192.168.1.30/24")
        networks.default_route(first, "192.168.1.30")
        networks.default_route(second, "192.168.1.20")
    except NoNetworks as e:
        pytest.skip(str(e))
    _, found = serve(
        "--model", model, "--blocks", "0:1", prefix=tuple(networks.inside(first)), until=r"petals-win (serve .+)"
    )
    line = found[1]
    assert "--peers /ip4/192.168.1.20/tcp/" in line
    arguments = [*shlex.split(line)[1:], "--blocks", "1:2", "--json"]
    _, joined = serve(*arguments, prefix=tuple(networks.inside(second)), until=r'(\{"event": "serving".*\})')
    assert json.loads(joined[1])["blocks"] == "1:2"


def daemon_flags(node: Child) -> list[str]:
    (daemon,) = [
        child for child in psutil.Process(node.pid).children(recursive=True) if child.name().startswith("p2pd")
    ]
    return daemon.cmdline()


@pytest.mark.parametrize("internet", [False, True])
def test_only_a_node_for_the_internet_opens_the_router_and_relays(serve, checkpoint, internet):
    model, more = str(checkpoint("llama", **TINY)), ["--internet"] if internet else []
    node, found = serve("--model", model, "--blocks", "0:1", *more, until=r"(?s)(.*)petals-win (serve .+)")
    flags = daemon_flags(node)
    for name in ("natPortMap", "relayService", "autoRelay"):
        assert f"-{name}={int(internet)}" in flags
    assert "-relay=1" in flags, "it can still talk to those who are reached by relays alone"
    assert ("--internet" in found[2]) == internet and ("router" in found[1]) == internet


def test_a_node_on_ipv6(serve, checkpoint):
    model = str(checkpoint("llama", **TINY))
    _, found = serve(
        "--model", model, "--blocks", "0:2", "--host", "::1", "--json", until=r'(\{"event": "joined".*\})'
    )
    (address,) = json.loads(found[1])["peers"]
    assert address.startswith("/ip6/::1/tcp/")
    _, joined = serve(
        *["--model", model, "--blocks", "0:2", "--host", "::1", "--peers", address, "--json"],
        until=r'(\{"event": "serving".*\})',
    )
    swarm = LocalSwarm(model, [])
    swarm.nodes = [type("Node", (), {"addresses": [address]})()]  # pyright: ignore[reportAttributeAccessIssue]
    remote = connect(swarm, model)
    try:
        assert remote(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
    finally:
        disconnect(remote)
        swarm.nodes = []


def test_a_host_that_is_no_address(checkpoint):
    host = "my-pc"
    model = str(checkpoint("llama", **TINY))
    done = subprocess.run(
        [*COMMAND, "serve", "--model", model, "--host", host], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"petals-win: '{host}' is no address" in done.stderr


PEER = """
import sys, threading, time
true, ahead = time.time, float(sys.argv[1])
time.time = lambda: true() + ahead
from hivemind import DHT
from petals_win.host.children import exit_with_parent
exit_with_parent()
dht = DHT(start=True)
print("peer", dht.get_visible_maddrs()[0], flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("ahead", "way", "command"),
    [
        (10, "behind", ["serve", "--host", "127.0.0.1"]),
        (-10, "ahead of", ["serve"]),
        (10, "behind", ["api", "--port", "0"]),
    ],
)
def test_a_clock_that_is_wrong(checkpoint, ahead, way, command):
    model = DEFAULT_MODEL if command[0] == "api" else str(checkpoint("llama", **TINY))
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    peer = spawn([sys.executable, "-c", PEER, str(ahead)], on_line=lines.put)
    try:
        address = lines.get(timeout=60).split()[1]
        done = subprocess.run(
            [*COMMAND, *command, "--model", model, "--peers", address],
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
    finally:
        peer.stop()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"The clock of this PC is about 10 seconds {way} that of the swarm" in done.stderr, done.stderr
