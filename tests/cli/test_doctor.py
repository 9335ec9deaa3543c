"""`petals-win doctor` on this PC, with real peers, a hub that refuses, and what other PCs may have wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from free_ports import free_port
from transformers import LlamaConfig
from typer.testing import CliRunner

from petals_win.cli.main import app
from petals_win.doctor import checks, computer, network
from petals_win.doctor.computer import check_disk, judge_torch
from petals_win.doctor.findings import Asked, Finding, finding_of, run_checks
from petals_win.doctor.peers import check_peers, judge_clock
from petals_win.errors import UserError
from petals_win.host.children import spawn
from petals_win.host.gpu import GpuError, NvidiaDriver, NvidiaGpu
from petals_win.kernels import library

# A member of a DHT whose clock is so many seconds ahead of this PC's.
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


def doctor(*arguments: str) -> tuple[int, list[dict]]:
    done = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    return done.exit_code, json.loads(done.stdout)["findings"]


def of(findings: list[dict], check: str) -> list[dict]:
    return [finding for finding in findings if finding["check"] == check]


@pytest.fixture
def peer_ahead() -> Iterator:
    """Starts a peer with its clock ahead; returns its address."""
    children = []

    def start(seconds: float) -> str:
        lines: list[str] = []
        told = threading.Event()

        def take(line: str) -> None:
            if line.startswith("peer "):
                lines.append(line.split()[1])
                told.set()

        children.append(spawn([sys.executable, "-c", PEER, str(seconds)], on_line=take))
        assert told.wait(60), children[-1].output_tail()
        return lines[0]

    yield start
    for child in children:
        child.stop()


def test_this_pc():
    status, findings = doctor()
    sometimes = {"peers", "paths", "gpu"}
    names = {name for name, _ in checks.CHECKS}
    assert {finding["check"] for finding in findings} - sometimes == names - sometimes
    assert of(findings, "p2pd")[0]["text"].startswith("p2pd ")
    assert all(finding["fix"] for finding in findings if finding["level"] != "ok")
    assert status == any(finding["level"] == "error" for finding in findings)


def test_what_a_person_reads_is_ascii():
    shown = CliRunner().invoke(app, ["doctor", "--model", "./nowhere"]).stdout
    assert (
        "[ok] Python 3." in shown and "[x]  There is no file or folder" in shown and "     -> Check the path." in shown
    )
    assert shown.isascii()


def test_a_peer_that_answers(peer_ahead):
    _, findings = doctor("--peers", peer_ahead(0))
    answers, clock = of(findings, "peers")
    assert (answers["level"], clock["level"]) == ("ok", "ok") and "answers" in answers["text"]
    assert "agrees" in clock["text"]


def test_a_peer_whose_clock_is_wrong(peer_ahead):
    status, findings = doctor("--peers", peer_ahead(-8))
    _, clock = of(findings, "peers")
    assert status == 1 and clock["level"] == "error"
    assert re.search(r"is [78]\.\d s behind", clock["text"]) and "Sync now" in clock["fix"]


@pytest.mark.parametrize(
    ("ahead", "doubt", "level"),
    [(0.2, 0.1, "ok"), (-2.0, 0.1, "warning"), (3.5, 0.1, "error"), (-3.5, 0.1, "error"), (3.5, 1.0, "warning")],
)
def test_clocks(ahead, doubt, level):
    found = judge_clock(ahead, doubt)
    assert found.level == level and bool(found.fix) == (level != "ok")


def test_a_peer_that_is_gone():
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
    (found,) = check_peers(Asked(peers=(address,)))
    assert found.level == "error" and f"nothing listens on its port {port}" in found.text and "serve" in found.fix


def test_a_program_that_is_no_peer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = f"/ip4/127.0.0.1/tcp/{port}/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
        (found,) = check_peers(Asked(peers=(address,)))
    assert found.level == "error" and found.fix


def test_what_is_no_address():
    (found,) = check_peers(Asked(peers=("192.168.1.5",)))
    assert found.level == "error" and "no address" in found.text and "/ip4/" in found.fix


def test_a_check_that_crashes_stops_no_other(monkeypatch):
    def crash() -> None:
        raise RuntimeError("no such counter\nand more")

    monkeypatch.setattr(psutil, "virtual_memory", crash)
    status, findings = doctor()
    (found,) = of(findings, "memory")
    assert status == 1 and found["level"] == "error" and found["fix"]
    assert found["text"] == "The check of memory crashed: RuntimeError: no such counter"
    assert of(findings, "disk") and of(findings, "firewall")


def test_findings_before_a_crash_are_kept():
    def half(_asked: Asked) -> Iterator[Finding]:
        yield Finding("ok", "this much is fine")
        raise UserError("Something is wrong. Turn it off: at the back. Then on.")

    first, second = [finding for _, finding in run_checks([("half", half)], Asked())]
    assert first.text == "this much is fine"
    assert second == Finding("error", "Something is wrong.", "Turn it off: at the back. Then on.")


def test_an_error_of_one_sentence_has_a_fix_too():
    assert finding_of(UserError("It is broken")).fix


def test_a_port_in_use_is_named():
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        status, findings = doctor("--port", str(port))
    assert status == 1 and f"Port {port} is in use" in of(findings, "ports")[0]["text"]


def test_a_disk_that_is_full(monkeypatch):
    for free, level in ((1 << 30, "error"), (10 << 30, "warning"), (500 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert {found.level for found in check_disk(Asked())} == {level}


RTX = NvidiaDriver("572.83", (12, 8), (NvidiaGpu("RTX 3060", 12 << 30, 11 << 30, (8, 6)),))
OLD = NvidiaDriver("470.10", (11, 4), (NvidiaGpu("GTX 1060", 6 << 30, 5 << 30),))
PASCAL = NvidiaDriver("580.10", (13, 0), (NvidiaGpu("GTX 1080", 8 << 30, 7 << 30, (6, 1)),))
NEW = NvidiaDriver("610.57", (13, 3), (NvidiaGpu("RTX 5090", 32 << 30, 30 << 30, (12, 0)), *PASCAL.gpus))
BLACKWELL = NvidiaDriver("572.83", (12, 8), NEW.gpus[:1])


@pytest.mark.parametrize(
    ("cuda", "computes", "driver", "level", "said", "fix"),
    [
        ("12.6", True, RTX, "ok", "computes on RTX 3060", ""),
        (None, False, None, "ok", "no NVIDIA GPU", ""),
        (None, False, RTX, "warning", "RTX 3060 would idle", "whl/cu126"),
        (None, False, NEW, "warning", "RTX 5090 and the GTX 1080 would idle", "whl/cu132"),
        (None, False, PASCAL, "warning", "GTX 1080 would idle", "whl/cu126"),
        (None, False, OLD, "warning", "GTX 1060 would idle", "newest driver"),
        (None, False, BLACKWELL, "warning", "RTX 5090 would idle", "needs 13.0 or newer"),
        ("13.0", False, RTX, "warning", "wants CUDA 13.0, the driver 572.83 does 12.8", "newest driver"),
        ("13.2", False, PASCAL, "warning", "wants CUDA 13.2, the driver 580.10 does 13.0", "whl/cu126"),
        ("13.0", False, NEW, "warning", "does not find the RTX 5090", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_torch_against_the_driver(cuda, computes, driver, level, said, fix):
    found = judge_torch("2.15.0", cuda, computes, driver)
    assert found.level == level and said in found.text and fix in found.fix


@pytest.mark.parametrize(
    ("computes", "levels"), [(True, ["ok"]), (False, ["error"])], ids=["it computes", "it has no kernels for the card"]
)
def test_what_a_card_does_is_tried(monkeypatch, computes, levels):
    """No card is here: torch is told that there is one, which computes as the CPU does, or fails."""
    real = torch.zeros

    def zeros(*size, device):
        if not computes:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")
        return real(*size)

    monkeypatch.setattr(computer, "find_nvidia", lambda: PASCAL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    found = list(computer.check_torch(Asked()))
    assert [finding.level for finding in found] == levels
    if not computes:
        assert "no kernel image" in found[0].text and "whl/cu126" in found[0].fix


@pytest.mark.parametrize(("free", "level"), [(11 << 30, "ok"), (5 << 30, "warning")])
@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_the_memory_of_a_card(monkeypatch, free, level, platform):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _number: (free, 12 << 30))
    monkeypatch.setattr(sys, "platform", platform)
    found, *more = computer.check_gpu_memory(Asked())
    assert found.level == level and f"{free >> 30}.0 of 12.0 GiB are free on cuda:0" in found.text
    assert bool(found.fix) == (level != "ok")
    assert [finding.level for finding in more] == ["ok"] * (platform == "win32")
    assert all('"CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"' in finding.text for finding in more)


def test_without_a_card_nothing_is_said_of_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert list(computer.check_gpu_memory(Asked())) == []


def test_a_driver_that_is_out_of_order(monkeypatch):
    def broken() -> None:
        raise GpuError("The NVIDIA driver hangs. Restart the PC.")

    monkeypatch.setattr(computer, "find_nvidia", broken)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warning, rest = computer.check_torch(Asked())
    assert warning == Finding("warning", "The NVIDIA driver hangs.", "Restart the PC.")
    assert rest.level == "ok" and "on the CPU until then" in rest.text


@pytest.mark.parametrize(
    ("state", "level"), [("allowed", "ok"), ("off", "ok"), ("missing", "warning"), ("blocked", "error")]
)
def test_the_firewall(monkeypatch, state, level):
    monkeypatch.setattr(network.firewall, "look", lambda program: state)
    (found,) = network.check_firewall(Asked())
    assert found.level == level and ("petals-win firewall add" in found.fix) == (level != "ok")


def test_a_model_of_which_no_block_fits(tmp_path):
    # Each of a block's three large matrices takes a third of this PC's memory.
    size = psutil.virtual_memory().total // (3 * 64 * 4)
    LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=size, num_hidden_layers=2).save_pretrained(tmp_path)
    status, findings = doctor("--model", str(tmp_path))
    assert status == 1 and "Not one block" in of(findings, "model")[-1]["text"]


def test_a_model_that_fits(tmp_path):
    LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2).save_pretrained(tmp_path)
    _, findings = doctor("--model", str(tmp_path))
    assert "2 of 2 blocks fit" in of(findings, "model")[-1]["text"]


class _Gated(BaseHTTPRequestHandler):
    """A hub that has the model, but not for whoever asks."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_args: object) -> None:
        pass


def test_a_gated_model(tmp_path: Path):
    with HTTPServer(("127.0.0.1", 0), _Gated) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-m", "petals_win.cli.main", "doctor", "--json", "--model", "meta-llama/Llama-2-70b-hf"],
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        hub.shutdown()
    assert done.returncode == 1, done.stderr
    gated, room = of(json.loads(done.stdout)["findings"], "model")
    assert gated["level"] == "error" and "gated" in gated["text"] and "token" in gated["fix"]
    assert "of 80 blocks" in room["text"], "its size is known all the same"


@pytest.mark.parametrize(
    ("variant", "loaded", "level", "said"),
    [
        ("avx2", True, "ok", "kernels for avx2"),
        ("avx2", False, "warning", "the kernels for avx2 cannot be loaded"),
        (None, False, "ok", "no kernels for this processor"),
    ],
)
def test_kernels(monkeypatch, variant, loaded, level, said):
    monkeypatch.setattr(library, "variant", lambda: variant)
    monkeypatch.setattr(library, "kernels", lambda: object() if loaded else None)
    (found,) = computer.check_kernels(Asked())
    assert found.level == level and said in found.text and bool(found.fix) == (level == "warning")
