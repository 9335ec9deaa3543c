"""In how many ways clients say what the text of an answer has to be, and what of it reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pydantic
import pytest

from api.fake_engine import MODEL
from api.serving import Served
from petals_win.engines.base import Constraint

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
ANY_OBJECT = Constraint("json_schema", '{"type": "object"}')
HELD = Constraint("json_schema", json.dumps(SCHEMA))


def ask(served: Served, fields: dict[str, Any], path: str = "chat/completions") -> httpx.Response:
    body = served.chat("say yes", **fields) if "chat" in path else {"model": MODEL, "prompt": "say yes", **fields}
    return httpx.post(f"{served.url}/v1/{path}", json=body)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, HELD),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            HELD,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": None}}}, ANY_OBJECT),
        ({"guided_json": SCHEMA}, HELD),
        ({"guided_json": json.dumps(SCHEMA)}, HELD),
        ({"guided_regex": "a+"}, Constraint("regex", "a+")),
        ({"guided_choice": ["yes", 'n"o']}, Constraint("grammar", 'start: "yes" | "n\\"o"')),
        ({"guided_grammar": "start: A"}, Constraint("grammar", "start: A")),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, Constraint("grammar", 'root ::= "a"')),
        ({"json_schema": SCHEMA, "grammar": ""}, HELD),
        ({"format": "json"}, ANY_OBJECT),
        ({"format": SCHEMA, "response_format": {"type": "text"}}, HELD),
        ({"structured_outputs": {"json": SCHEMA}}, HELD),
        ({"structured_outputs": {"json_object": True, "regex": None}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+", "whitespace_pattern": None}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, Constraint("grammar", 'start: "a"')),
        ({"structured_outputs": {"grammar": "start: A"}}, Constraint("grammar", "start: A")),
        # What front-ends send that ask for nothing.
        ({"response_format": {"type": "text"}, "guided_json": None, "format": ""}, None),
        ({"response_format": {}, "guided_json": "", "guided_regex": "", "guided_choice": [], "grammar": ""}, None),
        ({"structured_outputs": {}, "json_schema": {}, "format": {}, "guided_choice": None}, None),
    ],
)
def test_what_reaches_the_engine(served, path, fields, constraint):
    response = ask(served, fields, path)
    assert response.status_code == 200, response.text
    assert served.engine.requests[-1].constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "a", "grammar": "b"}, "grammar", "guided_regex and grammar exclude each other"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["a"]}},
            "structured_outputs.choice",
            "exclude each other",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
            "dictionary",
        ),
        ({"response_format": "json"}, "response_format", "dictionary or object"),
        (
            {"structured_outputs": {"structural_tag": {"a": 1}}},
            "structured_outputs",
            "structural_tag is not supported",
        ),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]", "valid string"),
        ({"guided_choice": ["a"] * 1001}, "guided_choice", "at most 1000"),
    ],
)
def test_what_is_wrong_is_named(served, fields, param, message):
    response = ask(served, fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"], error
    assert served.engine.requests == []


def test_the_official_client_asks_for_a_schema(served):
    city = pydantic.create_model("City", name=(str, ...), people=(int, ...))
    try:
        served.client().chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": 'say {"name":"Köln","people":1}'}], response_format=city
        )
    finally:
        constraint = served.engine.requests[-1].constraint
    assert constraint.kind == "json_schema" and json.loads(constraint.text)["required"] == ["name", "people"]
