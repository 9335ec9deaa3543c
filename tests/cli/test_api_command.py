"""`petals-win api` with several models, as a process of its own: small random ones, of two engines where there are two."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tiny_chat import tiny_chat_model

from petals_win.host.children import spawn
from petals_win.models.onnx_conversion import convert_to_onnx

SECONDS = 120


@contextmanager
def running(command: list[str], home: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the API that the command opens, and its lines so far. It is asked to end with the block, and ends soon."""
    lines: list[str] = []
    environment = {**os.environ, "PETALS_WIN_HOME": str(home), "OMP_NUM_THREADS": "1"}
    child = spawn([sys.executable, *command], env=environment, on_line=lines.append)
    try:
        until = time.monotonic() + SECONDS
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", "\n".join(lines))):
            assert time.monotonic() < until and child.returncode is None, "\n".join(lines)
            time.sleep(0.05)
        yield found[0], lines
    finally:
        began = time.monotonic()
        status = child.stop(30)
        took = time.monotonic() - began
    assert status == 0 and took < 20, f"status {status} after {took:.1f} s:\n" + "\n".join(lines)


def states(url: str) -> dict[str, str]:
    engines = httpx.get(f"{url}/ready", timeout=30).json()["engines"]
    return {f"{each['engine']}:{each['models'][0]}": each["state"] for each in engines}


def ask(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "count"}], "max_tokens": 5, "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=SECONDS)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_models_are_loaded_when_asked_for_and_unloaded_when_idle(tmp_path):
    folders = [tiny_chat_model(tmp_path / name, context=256, ends=0) for name in ("one", "two", "three")]
    converted = convert_to_onnx(str(folders[2]), tmp_path / "onnx", precision="fp32", device="cpu")
    models = ["--model", f"local:{folders[0]}", "--model", str(folders[1]), "--model", str(converted)]
    with running(
        ["-m", "petals_win.cli.main", "api", "--port", "0", *models, "--keep-alive", "3s", "--alias", "gpt-4o"],
        tmp_path / "home",
    ) as (url, lines):
        assert states(url) == dict.fromkeys(["local:one", "local:two", "onnx:three"], "unloaded")
        with ThreadPoolExecutor(8) as asking:
            answers = list(asking.map(lambda model: ask(url, model), ["one", "two", "gpt-4o", "three"] * 2))
        assert answers[:4] == answers[4:] and answers[0] == answers[2] and answers[0]
        until = time.monotonic() + SECONDS
        while set(states(url).values()) != {"unloaded"}:
            assert time.monotonic() < until, states(url)
            time.sleep(0.1)
        assert ask(url, "one") == answers[0]
        assert states(url)["local:one"] == "loaded"
        assert any("onnx, since the model was converted for it" in line for line in lines), lines


_SLOW = """
import threading
from petals_win.api.server import ApiServer
from petals_win.api.settings import Settings
from petals_win.cli.api import answer_until
from petals_win.engines.base import ModelCard
from petals_win.engines.offers import Offer
from petals_win.engines.several import SeveralEngines
from petals_win.host.children import exit_with_parent
from petals_win.host.ending import end_now
from petals_win.host.signals import stop_event

exit_with_parent()
stop, settings = stop_event(), Settings(port=0)
server = ApiServer(settings)
engine = SeveralEngines([Offer("local", (ModelCard("slow", 1, 100),), lambda: threading.Event().wait(), True)], 60)
answer_until(stop, engine, server, settings, on_ready=lambda: print(server.url, flush=True))
end_now(0)
"""


def test_it_ends_while_a_model_is_loaded(tmp_path):
    with ThreadPoolExecutor(1) as asking:
        with running(["-c", _SLOW], tmp_path / "home") as (url, _lines):
            asked = asking.submit(
                httpx.post, f"{url}/v1/completions", json={"model": "slow", "prompt": "x"}, timeout=SECONDS
            )
            until = time.monotonic() + SECONDS
            while states(url) != {"local:slow": "loading"}:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert asked.result().status_code == 503


@pytest.mark.parametrize("missing", ["local:./nothing", "onnx:./nothing"])
def test_what_cannot_be_loaded_is_told_at_the_start(tmp_path, missing):
    folder = tiny_chat_model(tmp_path / "one", context=256)
    command = ["-m", "petals_win.cli.main", "api", "--port", "0", "--model", str(folder), "--model", missing]
    with pytest.raises(AssertionError, match="nothing"), running(command, tmp_path / "home"):
        pass
