"""What LiteLLM gets from a real server, as a model of its provider "openai" with an address of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.clients import programs
from api.fake_engine import MODEL
from api.serving import serving
from petals_win.engines.base import GenerationRequest

TEXT = "say Grüße 你好 🎉"
CALLS = 'call weather {"city":"Köln"} weather {"city":"Bonn"}'
QUESTIONS = {
    "whole": TEXT,
    "streamed": TEXT,
    "called": CALLS,
    "called_streamed": f"{CALLS} | looking",
    "structured": 'say {"city":"Köln"}',
    "completion": "say it",
    "embedded": "some words",
    "unknown_model": TEXT,
    "too_long": "many " * 2000,
    "failing": "missing",
    "broken_stream": "break",
}
Read = tuple[dict[str, Any], list[GenerationRequest]]


@pytest.fixture(scope="module")
def read() -> Read:
    """What the client has read of each question, and what reached the engine."""
    with serving() as served:
        return programs.python("litellm_client.py", served.url, MODEL, QUESTIONS), served.engine.requests


def test_answers(read: Read):
    answers, _ = read
    assert answers["whole"] == {"text": "Grüße 你好 🎉", "calls": [], "reason": "stop", "tokens": 3}
    assert answers["streamed"].pop("chunks") > 3
    assert answers["streamed"] == answers["whole"]
    assert answers["completion"] == "it"
    assert answers["embedded"] == 3


def test_tools(read: Read):
    answers, requests = read
    calls = [["weather", '{"city":"Köln"}'], ["weather", '{"city":"Bonn"}']]
    for name in ("called", "called_streamed"):
        assert (answers[name]["calls"], answers[name]["reason"]) == (calls, "tool_calls")
    assert answers["called_streamed"]["text"] == "looking"
    assert any(request.tools and request.tools[0]["function"]["name"] == "weather" for request in requests)


def test_json_schema(read: Read):
    answers, requests = read
    assert json.loads(answers["structured"]["text"]) == {"city": "Köln"}
    [held] = [request.constraint for request in requests if request.constraint]
    assert held.kind == "json_schema" and json.loads(held.text)["required"] == ["city"]


@pytest.mark.parametrize(
    ("name", "error", "status", "message"),
    [
        ("unknown_model", "NotFoundError", 404, f"Ask for one of: {MODEL}"),
        ("too_long", "BadRequestError", 400, "2000 tokens"),
        ("failing", "ServiceUnavailableError", 503, "blocks 15:30"),
        ("broken_stream", None, None, "blocks 15:30"),
    ],
)
def test_errors(read: Read, name, error, status, message):
    told = read[0][name]
    assert message in told["message"]
    assert error is None or (told["error"], told["status"]) == (error, status)
