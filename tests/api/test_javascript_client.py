"""What OpenAI's own JavaScript client gets from a real server; needs Node.js."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.clients import programs
from api.fake_engine import MODEL
from api.serving import eventually, serving
from petals_win.engines.base import GenerationRequest

TEXT = "say Grüße 你好 🎉"
CALL = 'call weather {"city":"Köln"}'
QUESTIONS = {
    "models": "",
    "whole": TEXT,
    "streamed": TEXT,
    "called": CALL,
    "called_streamed": f"{CALL} | looking",
    "run": CALL,
    "structured": 'say {"city":"Köln"}',
    "structured_streamed": 'say {"city":"Köln"}',
    "responses": TEXT,
    "completion": "say it",
    "embedded": "some words",
    "unknown_model": TEXT,
    "failing": "missing",
    "broken_stream": "break",
    "aborted": "count 1500",
}
Read = tuple[dict[str, Any], list[GenerationRequest]]


@pytest.fixture(scope="module")
def read() -> Read:
    """What the client has read of each question, and what reached the engine."""
    with serving() as served:
        answers = programs.node("openai_client.mjs", served.url, MODEL, QUESTIONS)
        assert eventually(lambda: served.engine.running == 0), "what was aborted goes on"
        assert served.engine.cancelled == 1, "the answer that the client did not read to its end"
        return answers, served.engine.requests


def test_models(read: Read):
    assert read[0]["models"] == [MODEL]


def test_answers(read: Read):
    answers, _ = read
    assert answers["whole"] == {"text": "Grüße 你好 🎉", "calls": [], "reason": "stop", "tokens": 3}
    assert answers["streamed"] == {"text": "Grüße 你好 🎉", "pieces": 3, "tokens": 3}
    assert answers["responses"] == {"text": "Grüße 你好 🎉", "last": "response.completed"}
    assert answers["completion"] == "it"
    assert answers["embedded"] == ["number"] * 3, "asked for in base64, and read back"


def test_tools(read: Read):
    answers, requests = read
    calls = [["weather", '{"city":"Köln"}']]
    assert (answers["called"]["calls"], answers["called"]["reason"]) == (calls, "tool_calls")
    assert (answers["called_streamed"]["calls"], answers["called_streamed"]["text"]) == (calls, "looking")
    assert answers["run"] == {
        "cities": ["Köln"],
        "text": "sunny",
    }, "the client has called the tool and sent its result"
    assert any(request.tools and request.tools[0]["function"]["name"] == "weather" for request in requests)


def test_json_schema(read: Read):
    answers, requests = read
    for name in ("structured", "structured_streamed"):
        assert json.loads(answers[name]) == {"city": "Köln"}
    held = [request.constraint for request in requests if request.constraint]
    assert len(held) == 2 and all("additionalProperties" in each.text for each in held)


def test_errors(read: Read):
    answers, _ = read
    unknown, failing, broken = (answers[name] for name in ("unknown_model", "failing", "broken_stream"))
    assert (unknown["error"], unknown["status"], unknown["code"]) == ("NotFoundError", 404, "model_not_found")
    assert (failing["error"], failing["status"], failing["code"]) == ("InternalServerError", 503, "swarm_unavailable")
    assert "blocks 15:30" in broken["message"]


def test_aborting_a_stream(read: Read):
    assert read[0]["aborted"] is True
