"""A swarm put together by hand, as on separate PCs: each command is the one that the last one printed."""

from __future__ import annotations

import queue
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from free_ports import free_port
from models.hub import TOKEN, running_hub
from test_bad_input import assert_sentence, run

from petals_win.host.children import spawn
from petals_win.models.source import DEFAULT_MODEL

SECONDS = 120


class Running:
    """A command of petals-win, and the lines that it prints."""

    def __init__(self, command: str):
        name, *arguments = shlex.split(command)
        assert name == "petals-win"
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.child = spawn([sys.executable, "-m", "petals_win.cli.main", *arguments], on_line=self._new.put)

    def line(self, wanted: str) -> re.Match[str]:
        """Wait for a line that matches."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and (self.child.returncode is None or not self._new.empty()):
            try:
                self.lines.append(self._new.get(timeout=0.5))
            except queue.Empty:
                continue
            if match := re.search(wanted, self.lines[-1]):
                return match
        raise AssertionError(f"no line {wanted!r} in:\n" + "\n".join(self.lines))


@contextmanager
def typed() -> Iterator[Callable[[str], Running]]:
    """Types commands; all that were are asked to end at the end, the last one first, and have to end well."""
    running: list[Running] = []

    def type_command(command: str) -> Running:
        running.append(Running(command))
        return running[-1]

    try:
        yield type_command
    except BaseException:
        while running:
            running.pop().child.stop()
        raise
    assert [running.pop().child.stop(30) for _ in range(len(running))] == [0] * 3


def test_three_commands():
    with typed() as type_command:
        first = type_command(
            f"petals-win serve --model {DEFAULT_MODEL} --blocks 0:15 --host 127.0.0.1 --threads 1 --fresh"
        )
        join = first.line(r"^\s*(petals-win serve .*--peers \S+)\s*$")[1]
        second = type_command(f"{join} --blocks 15:30 --host 127.0.0.1 --threads 1 --fresh")
        peers = second.line(r"^\s*petals-win serve .*--peers (\S+)\s*$")[1]
        assert peers not in join, "it names itself, so that the next PC can join when the first is gone"

        api = type_command(f"petals-win api --model {DEFAULT_MODEL} --peers {peers} --port {free_port()}")
        url = api.line(r"(http://127\.0\.0\.1:\d+)")[1]
        deadline = time.monotonic() + SECONDS
        while not httpx.get(f"{url}/ready").json()["ready"]:
            assert time.monotonic() < deadline
            time.sleep(0.5)

        question = {
            "model": DEFAULT_MODEL,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json={**question, "temperature": 0}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."

        too_long = {"model": DEFAULT_MODEL, "prompt": "word " * 8200, "max_tokens": 5}
        for streamed in (False, True):
            refused = httpx.post(f"{url}/v1/completions", json={**too_long, "stream": streamed}, timeout=60)
            assert refused.status_code == 400, refused.text
            error = refused.json()["error"]
            assert re.search(
                r"The prompt has 8\d\d\d tokens, but prompt and answer together may have 8192", error["message"]
            )
            assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("command", ["serve", "api"])
def test_a_gated_model_without_a_token(command, tmp_path):
    with running_hub() as hub:
        hub.models["someone/secret-llama"] = {"config.json": b"{}"}
        hub.gated.add("someone/secret-llama")
        arguments = {
            "serve": ["--blocks", "0:1", "--host", "127.0.0.1"],
            "api": [
                "--port",
                "0",
                "--peers",
                "/ip4/127.0.0.1/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
            ],
        }[command]
        environment = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_TOKEN="", HF_HUB_DISABLE_TELEMETRY="1")
        asked = [command, "--model", "someone/secret-llama", *arguments]
        assert_sentence(run(*asked, **environment), "someone/secret-llama is gated", "HF_TOKEN", "--token-file")

        # A wrong one is refused as well, and appears nowhere.
        token_file = tmp_path / "token"
        token_file.write_text(wrong := "hf_" + "b" * 34)
        done = run(*asked, "--token-file", str(token_file), **environment)
        assert_sentence(done, "someone/secret-llama is gated")
        assert wrong not in done.stdout + done.stderr and TOKEN not in done.stdout + done.stderr
