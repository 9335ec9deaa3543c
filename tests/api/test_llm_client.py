"""What the command `llm` gets from a real server, which its settings name as a user would: in extra-openai-models.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.clients import programs
from api.fake_engine import MODEL

SETTINGS = """
- model_id: swarm
  model_name: {model}
  api_base: "{url}/v1"
  supports_tools: true
  supports_schema: true
- model_id: elsewhere
  model_name: nobody/nothing
  api_base: "{url}/v1"
"""
TOOL = """
def weather(city: str) -> str:
    "Tells the weather of a city."
    return "say sunny in " + city
"""


@pytest.fixture
def llm(served, tmp_path: Path):
    (tmp_path / "extra-openai-models.yaml").write_text(SETTINGS.format(model=MODEL, url=served.url), "utf-8")
    (tmp_path / "keys.json").write_text('{"openai": "unused"}', "utf-8")
    return lambda *arguments, model="swarm": programs.llm(tmp_path, "-m", model, *arguments)


def test_a_chat_that_goes_on(llm, served):
    first = llm("say Grüße 你好 🎉", "--system", "Be brief.", "-o", "temperature", "0")
    assert (first.returncode, first.stdout.strip()) == (0, "Grüße 你好 🎉"), first.stderr
    second = llm("--continue", "say more", "--no-stream")
    assert (second.returncode, second.stdout.strip()) == (0, "more"), second.stderr
    request = served.engine.requests[-1]
    assert [message["role"] for message in request.messages] == ["system", "user", "assistant", "user"]
    assert request.messages[2]["content"] == "Grüße 你好 🎉"


@pytest.mark.parametrize("how", [(), ("--no-stream",)])
def test_a_tool(llm, served, how):
    done = llm("--functions", TOOL, 'call weather {"city":"Köln"}', *how)
    assert (done.returncode, done.stdout.strip()) == (0, "sunny in Köln"), done.stderr
    assert served.engine.requests[0].tools[0]["function"]["name"] == "weather"


def test_a_json_schema(llm, served):
    done = llm("--schema", "city, people int", 'say {"city":"Köln","people":1}')
    assert (done.returncode, json.loads(done.stdout)) == (0, {"city": "Köln", "people": 1}), done.stderr
    assert json.loads(served.engine.requests[0].constraint.text)["required"] == ["city", "people"]


def test_an_error(llm):
    done = llm("Hi", model="elsewhere")  # not one that is sent again: that would take as long as Retry-After says
    assert done.returncode != 0 and f"Ask for one of: {MODEL}" in done.stderr
