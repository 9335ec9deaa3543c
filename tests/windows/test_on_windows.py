"""The main job under Windows Python with p2pd.exe: on any Windows PC, and from Linux by test_in_the_bench.py."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hivemind.p2p import P2P
from hivemind.proto import dht_pb2

from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="it takes Windows Python; scripts/windows-bench has one"
)

GONE_SECONDS = 5
INSTALL_SECONDS = 900


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to start petals-win: of the wheel that PETALS_WIN_WHEEL names, newly installed, or else of this checkout."""
    wheel = os.environ.get("PETALS_WIN_WHEEL")
    if wheel is None:
        return [sys.executable, "-m", "petals_win.cli.main"]
    venv = tmp_path_factory.mktemp("A user's Größe") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=INSTALL_SECONDS)
    began = time.monotonic()
    options = ["--quiet", "--no-compile", "--only-binary", "torch,numpy"]
    pip = [venv / "Scripts/python.exe", "-m", "pip", "install", *options, wheel]
    done = subprocess.run(pip, capture_output=True, encoding="utf-8", errors="replace", timeout=INSTALL_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in venv.rglob("*") if file.is_file())
    print(f"\npip installed {Path(wheel).name} in {seconds:.0f} s; its venv has {size / 1e6:,.0f} MB")
    return [str(venv / "Scripts/petals-win.exe")]


def ours() -> dict[int, str]:
    """The Python and p2pd processes of this PC, and what they run."""
    found = {}
    for process in psutil.process_iter(["name"]):
        if (process.info["name"] or "").lower() in ("python.exe", "p2pd.exe"):
            found[process.pid] = process.info["name"]
    return found


@pytest.mark.timeout(2 * INSTALL_SECONDS)
def test_up_check_says_paris_and_leaves_nothing_behind(program):
    before = ours()
    began = time.monotonic()
    done = subprocess.run(
        [*program, "up", "--check"], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=280
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    speed = re.search(r"([\d.]+) tokens/s", done.stdout)
    assert speed is not None
    print(f"up --check: {seconds:.0f} s, {speed[1]} tokens/s")
    assert {pid: name for pid, name in ours().items() if pid not in before} == {}


def test_p2pd_is_the_installed_package_s_own(program):
    if "PETALS_WIN_WHEEL" not in os.environ:
        pytest.skip("it takes a wheel made by scripts/build: PETALS_WIN_WHEEL names none")
    located = subprocess.run([*program, "p2pd", "locate"], capture_output=True, encoding="utf-8", timeout=120)
    assert located.returncode == 0, located.stderr
    assert "petals_win\\daemon\\bin\\p2pd.exe" in located.stdout


def test_a_call_over_quic():
    async def call() -> float:
        server = await P2P.create(host_maddrs=["/ip4/127.0.0.1/udp/0/quic-v1"])
        try:

            async def answer(request: dht_pb2.PingRequest, _context: object) -> dht_pb2.PingResponse:
                return dht_pb2.PingResponse(dht_time=7.0)

            await server.add_protobuf_handler("ping", answer, dht_pb2.PingRequest)
            addresses = [str(address) for address in await server.get_visible_maddrs()]
            assert addresses and all("/quic-v1/" in address for address in addresses)
            client = await P2P.create(initial_peers=addresses, host_maddrs=["/ip4/127.0.0.1/udp/0/quic-v1"])
            try:
                stub = client.call_protobuf_handler(
                    server.peer_id, "ping", dht_pb2.PingRequest(), dht_pb2.PingResponse
                )
                return (await asyncio.wait_for(stub, 30)).dht_time
            finally:
                await client.shutdown()
        finally:
            await server.shutdown()

    assert asyncio.run(call()) == 7.0


def test_a_node_ended_by_force_takes_its_daemon_along():
    """Statement 63 of the daemon's conformance checklist."""
    from greedy import TEXT, Client, text_by_transformers

    assert text_by_transformers() == TEXT
    with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30"], options=["--quant", "none"]) as swarm:
        swarm.wait_until_serving()
        client = Client(swarm.peers)
        try:
            assert client.text() == TEXT
        finally:
            client.close()
        seconds = seconds_until_gone(swarm.nodes[1].child.pid)
        print(f"\np2pd.exe was gone {seconds:.2f} s after TerminateProcess of its node")
        assert seconds < GONE_SECONDS


def seconds_until_gone(pid: int) -> float:
    """End a node by TerminateProcess; how long its daemon then runs."""
    node = psutil.Process(pid)
    daemons = [child for child in node.children(recursive=True) if child.name() == "p2pd.exe"]
    assert len(daemons) == 1
    node.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs(daemons, timeout=2 * GONE_SECONDS)
    assert not alive, "p2pd.exe outlives its node"
    return time.monotonic() - began
