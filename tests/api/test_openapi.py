"""/openapi.json against what is really sent: every answer here is checked by the schema of its route and status."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Description:
    """The openapi.json of a server, and whether values are as its schemas say (of what pydantic writes into them)."""

    def __init__(self, served: Served):
        self.whole = httpx.get(f"{served.url}/openapi.json").json()

    def check(self, response: httpx.Response, path: str | None = None) -> None:
        """The answer is documented: its status, its media type and its body."""
        operation = self.whole["paths"][path or response.request.url.path][response.request.method.lower()]
        documented = operation["responses"].get(str(response.status_code))
        assert documented, f"{path or response.request.url.path} documents no {response.status_code}"
        kind = response.headers["content-type"].partition(";")[0]
        content = documented["content"][kind]
        if kind == "application/json":
            self.matches(response.json(), content["schema"], "body")
            return
        *events, last = [
            line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data:")
        ]
        chunks = [json.loads(event) for event in events]
        if last != "[DONE]":
            self.matches(json.loads(last), {"$ref": "#/components/schemas/ErrorReply"}, "error")
        assert chunks
        done, told = content["itemSchema"]["properties"]["data"]["anyOf"]
        assert done == {"const": "[DONE]"}
        for chunk in chunks:
            self.matches(chunk, told["contentSchema"], "chunk")

    def matches(self, value: Any, schema: dict[str, Any], where: str) -> None:
        if "$ref" in schema:
            schema = self.whole["components"]["schemas"][schema["$ref"].removeprefix("#/components/schemas/")]
        if "anyOf" in schema:
            errors = []
            for choice in schema["anyOf"]:
                try:
                    return self.matches(value, choice, where)
                except AssertionError as error:
                    errors.append(str(error))
            raise AssertionError(f"{where}: {errors}")
        kinds: dict[str, Any] = {
            "object": dict, "array": list, "string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)
        }  # fmt: skip
        assert type(value) is kinds[schema["type"]], f"{where} is {value!r}, not {schema['type']}"
        assert value in schema.get("enum", [value]) and value == schema.get("const", value), f"{where} is {value!r}"
        if schema["type"] == "object":
            assert (
                set(schema.get("required", [])) <= set(value) <= set(schema["properties"])
            ), f"{where}: {list(value)}"
            for name, inner in value.items():
                self.matches(inner, schema["properties"][name], f"{where}.{name}")
        if schema["type"] == "array":
            for inner in value:
                self.matches(inner, schema["items"], f"{where}[]")


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with serving(FakeEngine(pace=0), api_keys=("key",), max_body_bytes=20_000, max_running=1, max_waiting=0) as served:
        yield served


@pytest.fixture(scope="module")
def description(keyed: Served) -> Description:
    return Description(keyed)


KEY = {"Authorization": "Bearer key"}


def body(path: str, text: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    return {"model": MODEL, **asked, **fields}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"n": 2, "max_tokens": 1}, 200),
        ({"stream": True}, 200),
        ({"stream": True, "stream_options": {"include_usage": True}}, 200),
        ({"temperature": "warm"}, 400),
        ({"logprobs": 6}, 400),
        ({"model": "other"}, 404),
    ],
)
def test_answers(keyed, description, path, fields, status):
    response = httpx.post(keyed.url + path, json=body(path, "say a b", **fields), headers=KEY)
    assert response.status_code == status
    description.check(response)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("text", "status"), [("missing", 503), ("crash", 500), ("x " * 3000, 400), ("x" * 30_000, 413)]
)
def test_answers_that_fail(keyed, description, path, text, status):
    response = httpx.post(keyed.url + path, json=body(path, text), headers=KEY)
    assert response.status_code == status
    description.check(response)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_that_breaks(keyed, description, path):
    response = httpx.post(keyed.url + path, json=body(path, "break", stream=True), headers=KEY)
    assert '"error"' in response.text
    description.check(response)


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/models", "/v1/models/x", "/ready"])
def test_who_may_not_ask(keyed, description, path):
    method = "POST" if path in (CHAT, TEXT) else "GET"
    documented = "/v1/models/{model_id}" if path == "/v1/models/x" else path
    for headers, status in (({}, 401), ({**KEY, "Origin": "https://evil.example"}, 403)):
        response = httpx.request(method, keyed.url + path, headers=headers)
        assert response.status_code == status
        description.check(response, documented)


def test_too_many(keyed, description):
    asked = json.dumps(body(TEXT, "wait")).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=30) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
        assert eventually(lambda: keyed.engine.running == 1)
        response = httpx.post(keyed.url + CHAT, json=body(CHAT, "Hi"), headers=KEY)
        assert response.status_code == 429
        description.check(response)
    assert eventually(lambda: keyed.engine.running == 0)


def test_a_request_that_does_not_end(keyed, description, monkeypatch):
    monkeypatch.setattr("petals_win.api.guards.BODY_DEADLINE_S", 0.2)

    def pieces() -> Iterator[bytes]:
        yield b"{"
        assert eventually(lambda: False, 0.6) is False
        yield b"}"

    response = httpx.post(keyed.url + CHAT, content=pieces(), headers=KEY)
    assert response.status_code == 408
    description.check(response)


def test_the_state(keyed, description, monkeypatch):
    for path in ("/health", "/ready", "/v1/models"):
        response = httpx.get(keyed.url + path, headers=KEY)
        assert response.status_code == 200
        description.check(response)
    for model, status in ((MODEL, 200), ("other", 404)):
        response = httpx.get(f"{keyed.url}/v1/models/{model}", headers=KEY)
        assert response.status_code == status
        description.check(response, "/v1/models/{model_id}")
    monkeypatch.setattr(keyed.engine, "missing_blocks", (1, 2))
    response = httpx.get(f"{keyed.url}/ready", headers=KEY)
    assert response.status_code == 503
    description.check(response)
    monkeypatch.setattr(keyed.engine, "status", lambda: 1 / 0)
    response = httpx.get(f"{keyed.url}/ready", headers=KEY)
    assert response.status_code == 500


def test_what_is_never_sent_is_not_documented(description):
    for path, operations in description.whole["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    assert not {"HTTPValidationError", "ValidationError"} & set(description.whole["components"]["schemas"])


def test_every_reference_leads_somewhere(description):
    text = json.dumps(description.whole)
    for reference in set(part.partition('"')[0] for part in text.split('"$ref": "')[1:]):
        assert reference.removeprefix("#/components/schemas/") in description.whole["components"]["schemas"], reference


def test_the_fields_of_a_request_are_there(description):
    fields = description.whole["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"logit_bias", "min_p", "chat_template_kwargs", "continue_final_message", "frequency_penalty"} <= set(
        fields
    )
