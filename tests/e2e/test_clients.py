"""Client programs that are not Python's, or a command, with answers of a real swarm. What they read of each answer is in tests/api."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from api.clients import programs
from free_ports import free_port

from petals_win.models.source import DEFAULT_MODEL

CITY = "What is the capital of France?"
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def url(swarm) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "petals_win.cli.main",
        "api",
        "--model",
        DEFAULT_MODEL,
        "--port",
        str(free_port()),
    ]
    api = subprocess.Popen(
        [*command, "--peers", swarm.peers[0]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    try:
        assert api.stdout is not None
        lines: list[str] = []
        for line in api.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        else:
            raise AssertionError("the API ended: " + "".join(lines))
    finally:
        api.terminate()
        api.communicate(timeout=60)


def test_openai_for_javascript(node_is_here, url):
    asked = {"whole": CITY, "streamed": CITY, "called": "Weather in Rome?", "structured": "Name a city."}
    told = programs.node("openai_client.mjs", url, DEFAULT_MODEL, asked)
    assert told["whole"]["text"] == told["streamed"]["text"] == PARIS
    assert told["whole"]["reason"] == "stop" and told["streamed"]["pieces"] > 3
    [[name, arguments]] = told["called"]["calls"]
    assert name == "weather" and isinstance(json.loads(arguments)["city"], str)
    assert isinstance(json.loads(told["structured"])["city"], str)


@pytest.fixture(scope="module")
def node_is_here() -> None:
    """Before a swarm is started for nothing."""
    programs.node_packages()
