"""What Ollama's own Python client gets from a real server, and what programs that speak Ollama's API send and read."""

from __future__ import annotations

import json
from typing import Any

import httpx
import ollama
import pytest

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.api import answering, streaming
from petals_win.api.ollama_replies import OllamaChatReply, OllamaError, OllamaGenerateReply
from petals_win.engines.base import (
    ChosenToken,
    Constraint,
    Finished,
    GenerationRequest,
    Thought,
    Token,
    TokenProbability,
    ToolCallArguments,
    ToolCallBegun,
)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = [
    Thought("Two cities"),
    Thought("."),
    ToolCallBegun(0, "call_a", "weather"),
    ToolCallArguments(0, '{"city": "Kö'),
    ToolCallArguments(0, 'ln"}'),
    ToolCallBegun(1, "call_b", "now"),
    Finished("tool_calls"),
]


@pytest.fixture
def client(served: Served) -> ollama.Client:
    return ollama.Client(served.url, timeout=20)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def posted(served: Served, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", json={"model": MODEL, "stream": False, **body}, timeout=20)


def asked(served: Served, path: str = "/api/chat", **body: Any) -> GenerationRequest:
    """The request that reaches the engine."""
    question: dict[str, Any] = {"messages": said("Hi")} if path == "/api/chat" else {"prompt": "Hi"}
    response = posted(served, path, **(question | body))
    assert response.status_code == 200, response.text
    return served.engine.requests[-1]


def test_chat(client, served):
    answer = client.chat(f"{MODEL}:latest", said("Hello there"))
    assert (answer.model, answer.done, answer.done_reason) == (f"{MODEL}:latest", True, "stop")
    assert (answer.message.role, answer.message.content) == ("assistant", "You said: Hello there")
    assert (answer.prompt_eval_count, answer.eval_count) == (2, 4)
    assert answer.total_duration == answer.load_duration + answer.prompt_eval_duration + answer.eval_duration
    assert 0 < answer.eval_duration < answer.total_duration < 20e9
    assert answer.message.thinking is None and answer.message.tool_calls is None


def test_chat_as_a_stream(client):
    *pieces, last = client.chat(MODEL, said("Grüße 你好 \u2028 🎉"), stream=True)
    assert "".join(piece.message.content for piece in pieces) == "You said: Grüße 你好 🎉"
    assert len(pieces) == 5, "one a token"
    assert not any(piece.done for piece in pieces) and all(piece.done_reason is None for piece in pieces)
    assert (last.done, last.done_reason, last.message.content, last.eval_count) == (True, "stop", "", 5)


def test_lines_of_json(served):
    response = posted(served, "/api/chat", messages=said("say ü\u0085"), stream=None)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.content.isascii() and response.content.endswith(b"}\n")
    lines = [json.loads(line) for line in response.content.splitlines()]
    for line in lines:
        OllamaChatReply.model_validate(line, strict=True)
    assert lines[0]["message"] == {"role": "assistant", "content": "ü"}
    assert set(lines[0]) == {"model", "created_at", "message", "done"}
    assert lines[0]["created_at"].endswith("Z")


def test_generate(client, served):
    answer = client.generate(MODEL, "Once upon", system="Be brief.", options={"num_predict": 3})
    assert (answer.response, answer.done_reason, answer.eval_count) == ("You said: Once", "length", 3)
    assert answer.context is None, "conversations are kept by who asks"
    request = served.engine.requests[-1]
    assert request.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon"})
    pieces = list(client.generate(MODEL, "Once upon", stream=True))
    assert "".join(piece.response for piece in pieces) == "You said: Once upon"
    assert [piece.done for piece in pieces] == [False] * 4 + [True]


def test_a_raw_prompt(client, served):
    assert client.generate(MODEL, "say [INST] hi", raw=True).response == "[INST] hi"
    assert (served.engine.requests[-1].prompt, served.engine.requests[-1].messages) == ("say [INST] hi", None)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(client, served, stream):
    served.engine.script = CALLS
    answer = client.chat(MODEL, said("Weather?"), tools=[TOOL], think=True, stream=stream)
    pieces = list(answer) if stream else [answer]
    calls = [call for piece in pieces for call in piece.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", {"city": "Köln"}),
        ("now", {}),
    ]
    assert "".join(piece.message.thinking or "" for piece in pieces) == "Two cities."
    assert "".join(piece.message.content for piece in pieces) == ""
    assert (pieces[-1].done_reason, pieces[-1].prompt_eval_count, pieces[-1].eval_count) == ("stop", 7, len(CALLS))
    request = served.engine.requests[-1]
    assert request.tools == (TOOL,)
    assert (request.tool_choice, request.template) == ("auto", {"enable_thinking": True})


def test_python_functions_as_tools(client, served):
    def weather(city: str) -> str:
        """Weather of a city.

        Args:
          city: its name
        """
        return city

    client.chat(MODEL, said("Hi"), tools=[weather])
    [tool] = served.engine.requests[-1].tools
    assert tool["function"]["name"] == "weather"
    assert tool["function"]["parameters"]["required"] == ["city"]


def test_a_call_in_the_shape_that_is_documented(served):
    served.engine.script = CALLS
    body = posted(served, "/api/chat", messages=said("Hi")).json()
    OllamaChatReply.model_validate(body, strict=True)
    assert body["message"]["tool_calls"][0] == {
        "id": "call_a",
        "function": {"index": 0, "name": "weather", "arguments": {"city": "Köln"}},
    }


def test_a_call_that_is_broken_off_is_text(served):
    served.engine.script = [ToolCallBegun(0, "a", "weather"), ToolCallArguments(0, '{"city": '), Finished("length")]
    body = posted(served, "/api/chat", messages=said("Hi")).json()
    assert body["message"] == {"role": "assistant", "content": 'weather({"city": )'}
    assert body["done_reason"] == "length"


def test_thoughts_of_a_plain_generation(client, served):
    served.engine.script = [Thought("Hm"), Token("Yes"), Finished("stop")]
    answer = client.generate(MODEL, "Hi", think="low")
    assert (answer.thinking, answer.response) == ("Hm", "Yes")
    assert served.engine.requests[-1].template == {"enable_thinking": True, "reasoning_effort": "low"}
    OllamaGenerateReply.model_validate(posted(served, "/api/generate", prompt="Hi").json(), strict=True)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_json_schema(served, path):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert asked(served, path, format=schema).constraint == Constraint("json_schema", json.dumps(schema))
    assert asked(served, path, format="json").constraint == Constraint("json_schema", '{"type": "object"}')
    for nothing in ("", None):
        assert asked(served, path, format=nothing).constraint is None


def test_log_probabilities(client, served):
    chosen = ChosenToken(5, b"\xc3", -0.5, (TokenProbability(5, b"\xc3", -0.5), TokenProbability(6, b"x", -1e999)))
    served.engine.script = [Token("", (chosen,)), Token("é", (ChosenToken(7, b"\xa9", 0.0),)), Finished("stop")]
    answer = client.chat(MODEL, said("Hi"), logprobs=True, top_logprobs=2)
    first, second = answer.logprobs
    assert (first.token, first.logprob, [other.logprob for other in first.top_logprobs]) == ("�", -0.5, [-0.5, -9999])
    assert (second.logprob, second.top_logprobs) == (0, None)
    assert served.engine.requests[-1].logprobs == 2
    OllamaChatReply.model_validate(posted(served, "/api/chat", messages=said("Hi")).json(), strict=True)
    assert asked(served, top_logprobs=5).logprobs is None


def test_a_conversation_with_tools(served):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "thinking": "Ask.",
            "tool_calls": [
                {"function": {"name": "weather", "arguments": {"city": "Köln"}}},
                {"function": {"index": 1, "name": "now", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_name": "now", "content": "12:00"},
        {"role": "tool", "content": "say sunny"},
    ]
    _, _, assistant, now, weather = asked(served, messages=conversation).messages or ()
    calls = assistant["tool_calls"]
    assert (assistant["content"], assistant["reasoning_content"]) == ("", "Ask.")
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": {"city": "Köln"}},
        {"name": "now", "arguments": {}},
    ]
    ids = [call["id"] for call in calls]
    assert len(set(ids)) == 2 and all(len(id) == 9 and id.isalnum() for id in ids)
    assert now == {"role": "tool", "content": "12:00", "tool_call_id": ids[1], "name": "now"}
    assert weather == {"role": "tool", "content": "say sunny", "tool_call_id": ids[0], "name": "weather"}


def test_ids_that_calls_have_are_kept(served):
    call = {"id": "mine", "function": {"name": "weather", "arguments": {}}}
    conversation = [
        {"role": "assistant", "tool_calls": [call, {**call, "id": "other"}]},
        {"role": "tool", "tool_call_id": "other", "content": "say b"},
    ]
    assistant, result = asked(served, messages=conversation).messages or ()
    assert [call["id"] for call in assistant["tool_calls"]] == ["mine", "other"]
    assert (result["tool_call_id"], result["name"]) == ("other", "weather")


def test_an_answer_that_was_begun_is_continued(served):
    begun = [*said("Capital?"), {"role": "assistant", "content": "say yes"}]
    assert asked(served, messages=begun).continue_final
    assert not asked(served, messages=said("Hi")).continue_final


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_predict": 5}, {"max_tokens": 5}),
        ({"num_predict": -1}, {"max_tokens": None}),
        ({"num_predict": -2}, {"max_tokens": None}),
        ({"num_predict": 0}, {"max_tokens": None}),
        ({"temperature": 0.5, "top_p": 0.9, "min_p": 0.1}, {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repeat_penalty": 0}, {"repetition_penalty": 1.0}),
        ({"repeat_penalty": 1.2, "repeat_last_n": 64}, {"repetition_penalty": 1.2}),
        (
            {"repeat_penalty": 1.2, "repeat_last_n": 0, "presence_penalty": 1},
            {"repetition_penalty": 1.0, "presence_penalty": 0},
        ),
        ({"frequency_penalty": 1, "presence_penalty": -1}, {"frequency_penalty": 1, "presence_penalty": -1}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": None}),
        ({"stop": ["a", ""]}, {"stop": ("a",)}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"num_ctx": 8192, "num_gpu": 1, "temperature": None}, {"temperature": None}),
        ({}, {"temperature": None, "top_p": None, "top_k": None, "min_p": None, "repetition_penalty": None}),
    ],
)
def test_options(served, options, expected):
    request = asked(served, options=options)
    assert {name: getattr(request, name) for name in expected} == expected


def test_options_that_mean_nothing_here_are_named_once(served, caplog, monkeypatch):
    monkeypatch.setattr("petals_win.api.schemas._named", set())
    caplog.set_level("INFO")
    for _ in range(2):
        asked(served, options={"mirostat": 2, "num_ctx": 10}, keep_alive="5m", surprise=1)
    ignored = [message for message in caplog.messages if "ignored" in message]
    assert len(ignored) == 2 and "mirostat" in ignored[0] + ignored[1] and "surprise" in ignored[0] + ignored[1]


@pytest.mark.parametrize(("think", "template"), [(False, {"enable_thinking": False}), (None, {}), ("", {})])
def test_whether_to_think(served, think, template):
    assert asked(served, think=think).template == template


def test_the_load_request(client, served):
    for answer in (client.generate(MODEL), client.generate(MODEL, "", keep_alive=0), client.chat(MODEL)):
        assert (answer.done, answer.done_reason) == (True, "load")
    [line] = client.generate(MODEL, stream=True)
    assert (line.done, line.response) == (True, "")
    assert served.engine.requests == []


@pytest.mark.parametrize(
    "name", [MODEL, f"{MODEL}:latest", "fake-model", "FAKE-MODEL:latest", "Made-Up/fake-model:latest"]
)
def test_names_of_the_model(client, served, name):
    assert client.chat(name, said("Hi")).model == name
    assert client.show(name).modelinfo["general.basename"] == MODEL
    assert served.engine.requests[-1].model == MODEL


def test_models(client):
    [model] = client.list().models
    assert (model.model, model.modified_at.year) == (f"{MODEL}:latest", 2023)
    [running] = client.ps().models
    assert (running.name, running.context_length, running.expires_at.year) == (f"{MODEL}:latest", 2000, 9999)
    assert running.digest == model.digest and len(model.digest) == 64
    shown = client.show(MODEL)
    assert {"completion", "tools", "thinking"} == set(shown.capabilities)
    assert shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"] == 2000


def test_the_older_name_of_a_model(served):
    assert httpx.post(f"{served.url}/api/show", json={"name": MODEL}).status_code == 200


def test_it_is_alive(served):
    response = httpx.head(served.url)
    assert (response.status_code, response.content) == (200, b"")
    major, minor, _ = httpx.get(f"{served.url}/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 9), "programs ask for a version that knows tools and thinking"


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", None]
)
def test_json_by_any_name(served, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = json.dumps({"model": MODEL, "prompt": "say ü", "stream": False}).encode()
    assert httpx.post(f"{served.url}/api/generate", content=body, headers=headers).json()["response"] == "ü"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/chat", {"model": "other"}, 404, f"no model 'other' here. Ask for one of: {MODEL}."),
        ("/api/show", {"model": "other"}, 404, "no model 'other'"),
        ("/api/chat", {"model": None}, 400, "model: field required."),
        ("/api/chat", {"messages": said("missing")}, 503, "blocks 15:30"),
        ("/api/chat", {"messages": said("x " * 3000)}, 400, "3000 tokens"),
        ("/api/chat", {"messages": said("crash")}, 500, "An error inside petals-win"),
        ("/api/chat", {"messages": [{"role": "x", "content": ""}]}, 400, "messages[0].role: "),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["aaaa"]}]}, 400, "images is not supp"),
        ("/api/chat", {"messages": said("\ud800")}, 400, "surrogate"),
        ("/api/chat", {"options": {"temperature": -1}}, 400, "options.temperature: "),
        ("/api/chat", {"options": {"repeat_penalty": 0.001}}, 400, "options.repeat_penalty: less than 0.01"),
        ("/api/chat", {"format": "xml"}, 400, 'format: "json" or a JSON schema'),
        ("/api/chat", {"think": 3}, 400, "think: true, false or a level"),
        ("/api/chat", {"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name: "),
        ("/api/generate", {"images": ["aaaa"]}, 400, "images is not supported here"),
        ("/api/generate", {"suffix": "x"}, 400, "suffix is not supported here"),
        ("/api/generate", {"template": "{{ .Prompt }}"}, 400, "template is not supported here"),
        ("/api/generate", {"context": [1]}, 400, "context is not supported here. Send the conversation to /api/chat."),
        ("/api/generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "leave system out"),
        ("/api/pull", {}, 400, "/api/pull is not supported here. Models are fetched when"),
        ("/api/create", {}, 400, "not supported here"),
        ("/api/copy", {}, 400, "not supported here"),
        ("/api/push", {}, 400, "not supported here"),
        ("/api/blobs/sha256:12", {}, 400, "not supported here"),
        ("/api/nothing", {}, 404, "There is no POST /api/nothing here."),
        ("/api/tags", {}, 405, "POST /api/tags is not possible: use GET."),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_in_ollamas_form(served, path, body, status, words, stream):
    content = json.dumps({"model": MODEL, "stream": stream, **body}).encode()
    response = httpx.post(f"{served.url}{path}", content=content, timeout=20)
    if path == "/api/chat" and body.get("messages") == said("crash") and stream:
        *pieces, last = [json.loads(line) for line in response.text.splitlines()]
        assert len(pieces) == 2 and words in last["error"], "it crashed after two tokens"
        return
    assert response.status_code == status, response.text
    OllamaError.model_validate(response.json(), strict=True)
    assert words in response.json()["error"]
    assert ("retry-after" in response.headers) == (status == 503)


def test_errors_before_the_routes_are_in_ollamas_form():
    with serving(api_keys=("key",), max_body_bytes=100) as served:
        refused = httpx.post(f"{served.url}/api/chat")
        assert refused.status_code == 401 and refused.json().keys() == {"error"}
        large = httpx.post(f"{served.url}/api/chat", content=b"x" * 200, headers={"Authorization": "Bearer key"})
        assert large.status_code == 413 and isinstance(large.json()["error"], str)
        client = ollama.Client(served.url, headers={"Authorization": "Bearer key"})
        assert len(client.list().models) == 1
        with pytest.raises(ollama.ResponseError, match="needs a key"):
            ollama.Client(served.url).list()


def test_other_paths_below_api_have_the_common_form(served):
    for path in ("/api/v1/x", "/api/v2/x"):
        assert "message" in httpx.get(f"{served.url}{path}").json()["error"], path
    assert isinstance(httpx.get(f"{served.url}/api/v10").json()["error"], str)


def test_the_client_raises_what_fails(client):
    with pytest.raises(ollama.ResponseError, match="no model 'other'") as raised:
        client.chat("other", said("Hi"))
    assert raised.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="blocks 15:30"):
        list(client.chat(MODEL, said("break"), stream=True))
    with pytest.raises(ollama.ResponseError, match="not supported here"):
        client.pull("llama3")
    with pytest.raises(ollama.ResponseError, match="not supported here"):
        client.delete(MODEL)


def test_pings_are_lines_without_text(monkeypatch):
    monkeypatch.setattr(streaming, "PING_S", 0.05)
    monkeypatch.setattr(answering, "FIRST_EVENT_S", 0.01)
    with serving(FakeEngine(pace=0.4)) as served:
        client = ollama.Client(served.url, timeout=20)
        pieces = list(client.chat(MODEL, said("say a b"), stream=True))
        assert "".join(piece.message.content for piece in pieces) == "a b"
        assert sum(not piece.message.content and not piece.done for piece in pieces) >= 1
        assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_client_that_goes_away_ends_the_answer(client, served):
    stream = client.chat(MODEL, said("count 1000"), stream=True)
    next(stream)
    stream.close()
    assert eventually(lambda: served.engine.cancelled == 1)


def test_what_is_sent_is_documented(served):
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    for path in ("/api/chat", "/api/generate"):
        responses = paths[path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "application/x-ndjson"}
        for status in ("400", "401", "403", "404", "408", "413", "429", "500", "503"):
            [kind] = responses[status]["content"].values()
            assert kind["schema"] == {"$ref": "#/components/schemas/OllamaError"}
    assert {"/api/tags", "/api/ps", "/api/show", "/api/version"} <= set(paths)
    assert "/api/pull" not in paths
