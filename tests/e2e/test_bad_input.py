"""What a user gets wrong ends in a clear sentence, a non-zero exit status, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from free_ports import free_port

from petals_win.models.default_model import default_model_file
from petals_win.models.source import DEFAULT_MODEL


def run(*arguments: str, timeout: float = 150, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line to its end; no process of its may be left."""
    mark = f"petals-win-test-{time.monotonic_ns()}"
    env = {**os.environ, **environment, "PETALS_WIN_TEST_MARK": mark}
    done = subprocess.run(
        [sys.executable, "-m", "petals_win.cli.main", *arguments],
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )
    left = [process for process in psutil.process_iter() if _environment(process).get("PETALS_WIN_TEST_MARK") == mark]
    _, left = psutil.wait_procs(left, timeout=30)
    assert not left
    return done


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}


def assert_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    sentence = done.stderr[done.stderr.index("petals-win: ") :]
    for word in words:
        assert word in sentence, sentence
    assert len(sentence) < 1000


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run("serve", "--host", "127.0.0.1", *arguments, **environment)


def test_unknown_folder():
    assert_sentence(serve("--model", "./no/such/model"), str(Path("no/such/model")))


def test_no_network_to_the_hub():
    done = serve("--model", "someone/some-model", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert_sentence(done, "someone/some-model", "hub")


def test_blocks_out_of_range():
    assert_sentence(serve("--model", DEFAULT_MODEL, "--blocks", "10:99"), "10:99", "0:30")


def test_blocks_that_are_no_range():
    assert_sentence(serve("--model", DEFAULT_MODEL, "--blocks", "all"), "'all'", "0:15")


def test_too_little_memory(checkpoint):
    folder = checkpoint("llama", vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    described = json.loads((folder / "config.json").read_text())
    # Each of a block's three large matrices takes half of this PC's memory.
    described["intermediate_size"] = psutil.virtual_memory().total // (2 * 64 * 4)
    (folder / "config.json").write_text(json.dumps(described))
    assert_sentence(serve("--model", str(folder), "--blocks", "0:2"), "0 blocks fit")


def test_wrong_peers_address():
    assert_sentence(serve("--model", DEFAULT_MODEL, "--blocks", "0:1", "--peers", "192.168.1.5"), "192.168.1.5")


def test_peers_that_do_not_answer():
    peer = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
    assert_sentence(serve("--model", DEFAULT_MODEL, "--blocks", "0:1", "--peers", peer), peer)
    assert_sentence(run("api", "--port", "0", "--model", DEFAULT_MODEL, "--peers", peer), peer)


@pytest.mark.parametrize("command", ["serve", "api", "up"])
def test_port_in_use(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = {
            "serve": ["--model", DEFAULT_MODEL, "--blocks", "0:1", "--host", "127.0.0.1"],
            "api": ["--model", DEFAULT_MODEL, "--peers", "/ip4/127.0.0.1/tcp/1/p2p/x"],
            "up": [],
        }[command]
        assert_sentence(run(command, *arguments, "--port", port), port, "in use")


def test_truncated_gguf(tmp_path):
    whole = default_model_file()
    part = tmp_path / "part.gguf"
    with open(whole, "rb") as source, open(part, "wb") as target:
        target.write(source.read(whole.stat().st_size // 2))
    assert_sentence(serve("--model", str(part), "--blocks", "0:30"), "part.gguf")


def test_truncated_safetensors(checkpoint, tmp_path):
    folder = checkpoint("llama", vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert_sentence(serve("--model", str(folder), "--blocks", "0:2"), "model.safetensors")


def test_a_swarm_without_peers():
    assert_sentence(run("api", "--port", "0", "--model", DEFAULT_MODEL, "--engine", "petals"), "--peers")


def test_an_engine_that_there_is_not():
    for command in ("api", "up"):
        assert_sentence(
            run(command, "--port", "0", "--model", DEFAULT_MODEL, "--engine", "nope"),
            "auto, command, local, onnx, openai, petals",
        )


def test_wrong_usage_is_exit_status_2():
    assert run("serve", "--no-such-option").returncode == 2
