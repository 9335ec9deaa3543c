"""What Anthropic's own Python client gets from a real server, and what programs that speak its Messages API send and read."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from pydantic import BaseModel

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.api import answering, streaming
from petals_win.api.anthropic_replies import AnthropicError, AnthropicMessage
from petals_win.engines.base import (
    Constraint,
    Finished,
    GenerationRequest,
    Thought,
    Token,
    ToolCallArguments,
    ToolCallBegun,
)

PATH = "/v1/messages"
TOOL = {
    "name": "weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = [
    Thought("Two"),
    Thought(" cities."),
    Token("I"),
    Token(" look."),
    ToolCallBegun(0, "call_a", "weather"),
    ToolCallArguments(0, '{"city": "Kö'),
    ToolCallArguments(0, 'ln"}'),
    ToolCallBegun(1, "call_b", "now"),
    Finished("tool_calls"),
]


def client_of(served: Served, **fields: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, **{"api_key": "unused", "max_retries": 0, "timeout": 20, **fields})


@pytest.fixture
def client(served: Served) -> anthropic.Anthropic:
    return client_of(served)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def posted(served: Served, **body: Any) -> httpx.Response:
    asked = {"model": MODEL, "max_tokens": 50, "messages": said("Hi"), **body}
    return httpx.post(f"{served.url}{PATH}", content=json.dumps(asked).encode(), headers=JSON, timeout=20)


JSON = {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}


def asked(served: Served, **body: Any) -> GenerationRequest:
    """The request that reaches the engine."""
    response = posted(served, **body)
    assert response.status_code == 200, response.text
    return served.engine.requests[-1]


def test_a_message(client):
    message = client.messages.create(model="fake-model", max_tokens=50, messages=said("recall 2 of these"))
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_")
    [block] = message.content
    assert (block.type, block.text) == ("text", "You said: recall 2 of these")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 2, 6)


def test_a_message_as_a_stream(client):
    with client.messages.stream(model=MODEL, max_tokens=50, messages=said("Grüße 你好 🎉")) as stream:
        assert "".join(stream.text_stream) == "You said: Grüße 你好 🎉"
        message = stream.get_final_message()
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 3, 5)


def test_the_events_of_a_stream(served):
    response = posted(served, messages=said("say a b"), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for event in response.text.strip().split("\n\n"):
        name, data = event.splitlines()
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        events.append(body)
    begun = events[0]["message"]
    assert (begun["role"], begun["content"], begun["stop_reason"]) == ("assistant", [], None)
    usage = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    assert events[1:] == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " b"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"input_tokens": 3, "output_tokens": 2, **usage},
        },
        {"type": "message_stop"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(client, served, stream):
    served.engine.script = CALLS
    fields: Any = {
        "model": MODEL,
        "max_tokens": 2000,
        "messages": said("Weather?"),
        "tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    if stream:
        with client.messages.stream(**fields) as answer:
            message = answer.get_final_message()
    else:
        message = client.messages.create(**fields)
    thinking, text, first, second = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Two cities.")
    assert (text.type, text.text) == ("text", "I look.")
    assert (first.type, first.id, first.name, first.input) == ("tool_use", "call_a", "weather", {"city": "Köln"})
    assert (second.type, second.id, second.name, second.input) == ("tool_use", "call_b", "now", {})
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (4, 3)
    request = served.engine.requests[-1]
    function = {"name": "weather", "description": TOOL["description"], "parameters": TOOL["input_schema"]}
    assert request.tools == ({"type": "function", "function": function},)
    assert (request.tool_choice, request.parallel_tool_calls) == ("required", False)
    assert request.template == {"enable_thinking": True}


def test_blocks_come_one_after_the_other(served):
    served.engine.script = CALLS
    events = [
        json.loads(line[6:]) for line in posted(served, stream=True).text.splitlines() if line.startswith("data: ")
    ]
    order = [
        (event["type"].removeprefix("content_block_"), event["index"])
        for event in events
        if event["type"].startswith("content_block_")
    ]
    first, more = [("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)], [("start", 3), ("stop", 3)]
    assert order == first + [(kind, 1) for kind, _ in first] + [(kind, 2) for kind, _ in first] + more
    AnthropicMessage.model_validate(posted(served).json(), strict=True)


def test_an_input_that_is_broken_off_is_kept_as_text(served):
    served.engine.script = [ToolCallBegun(0, "a", "weather"), ToolCallArguments(0, '{"city": '), Finished("length")]
    message = posted(served).json()
    assert message["content"] == [
        {"type": "tool_use", "id": "a", "name": "weather", "input": {"INVALID_JSON": '{"city": '}}
    ]
    assert message["stop_reason"] == "max_tokens"


def test_an_answer_that_says_nothing(client, served):
    served.engine.script = [Token(""), Finished("stop")]
    assert client.messages.create(model=MODEL, max_tokens=5, messages=said("Hi")).content == []
    with client.messages.stream(model=MODEL, max_tokens=5, messages=said("Hi")) as stream:
        assert stream.get_final_message().content == []


def test_why_it_stopped(client):
    def stopped(text: str, **fields: Any) -> tuple[Any, ...]:
        fields = {"max_tokens": 50, **fields}
        message = client.messages.create(model=MODEL, messages=said(text), **fields)
        return message.stop_reason, message.stop_sequence, "".join(block.text for block in message.content)

    assert stopped("say a b c", stop_sequences=["x", "c", " b"]) == ("stop_sequence", " b", "a")
    assert stopped("say a b c", stop_sequences=["", "x"]) == ("end_turn", None, "a b c")
    assert stopped("say a b c", max_tokens=2) == ("max_tokens", None, "a b")
    with client.messages.stream(model=MODEL, max_tokens=5, messages=said("say a b"), stop_sequences=["b"]) as stream:
        message = stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "b")


class Person(BaseModel):
    name: str


def test_a_json_schema(client, served):
    served.engine.script = [Token('{"name": "Ada"}'), Finished("stop")]
    message = client.messages.parse(model=MODEL, max_tokens=50, messages=said("Who?"), output_format=Person)
    assert message.parsed_output == Person(name="Ada")
    constraint = served.engine.requests[-1].constraint
    assert constraint.kind == "json_schema" and json.loads(constraint.text)["properties"].keys() == {"name"}
    schema = {"type": "object"}
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    request = asked(served, output_config=config)
    assert request.constraint == Constraint("json_schema", json.dumps(schema))
    assert request.template == {"reasoning_effort": "low"}


def test_a_conversation(served):
    request = asked(
        served,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, text("No lists.")],
        messages=[
            {"role": "user", "content": [text("Weather?"), text("And time?")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Ask.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    text("I look."),
                    {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Köln"}},
                    {"type": "tool_use", "id": "b", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": [text("sunny")]},
                    {"type": "tool_result", "tool_use_id": "b", "content": "no clock", "is_error": True},
                    text("say well"),
                ],
            },
        ],
    )
    functions = [{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "now", "arguments": {}}]
    calls = [
        {"id": id, "type": "function", "function": function} for id, function in zip("ab", functions, strict=True)
    ]
    assert request.messages == (
        {"role": "system", "content": "Be brief.\nNo lists."},
        {"role": "user", "content": "Weather?\nAnd time?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Ask.", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "a", "name": "weather"},
        {"role": "tool", "content": "Error: no clock", "tool_call_id": "b", "name": "now"},
        {"role": "user", "content": "say well"},
    )


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_a_result_alone_and_one_without_content(served):
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a"}
    request = asked(served, messages=[{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}])
    assert request.messages[1:] == ({"role": "tool", "content": "", "tool_call_id": "a", "name": "f"},)


def test_turns_of_one_side_are_one(served):
    begun = [*said("a"), *said("b"), {"role": "assistant", "content": "say c"}, {"role": "assistant", "content": "d"}]
    request = asked(served, messages=begun)
    assert request.messages == ({"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "say c\nd"})
    assert request.continue_final, "what the assistant has begun goes on"
    assert not asked(served).continue_final


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 5}, {"temperature": 0.5, "top_p": 0.9, "top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({}, {"temperature": None, "top_p": None, "top_k": None, "tools": (), "tool_choice": "auto", "template": {}}),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, {"tool_choice": "auto", "parallel_tool_calls": True}),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}, {"tool_choice": "weather"}),
        ({"tools": [{**TOOL, "type": "custom"}]}, {"tool_choice": "auto"}),
        ({"thinking": {"type": "disabled"}}, {"template": {"enable_thinking": False}}),
        ({"thinking": {"type": "adaptive"}}, {"template": {}}),
        ({"metadata": {"user_id": "u"}, "service_tier": "auto", "container": None}, {"temperature": None}),
    ],
)
def test_fields(served, fields, expected):
    request = asked(served, **fields)
    assert {name: getattr(request, name) for name in expected} == expected


def image(**more: Any) -> list[Any]:
    return [{"type": "image", "source": {"type": "url", "url": "x"}, **more}]


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"model": "other"}, 404, "not_found_error", f"no model 'other' here. Ask for one of: {MODEL}."),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: field required."),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens: "),
        ({"messages": []}, 400, "invalid_request_error", "messages: "),
        ({"messages": said("\ud800")}, 400, "invalid_request_error", "surrogate"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role: "),
        ({"messages": [{"role": "user", "content": image()}]}, 400, "invalid_request_error", "type image is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            400,
            "invalid_request_error",
            "type document is not supported here: send text.",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": image()}]}
                ]
            },
            400,
            "invalid_request_error",
            "type image is not",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400,
            "invalid_request_error",
            "messages[0].content[0]: a block of type text needs text.",
        ),
        ({"messages": [{"role": "user", "content": [{}]}]}, 400, "invalid_request_error", "a block needs a type"),
        ({"system": image()}, 400, "invalid_request_error", "type image is not"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            400,
            "invalid_request_error",
            "A tool of type web_search_20250305 is not supported here",
        ),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools[0].input_schema: field required."),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}},
            400,
            "invalid_request_error",
            "tool_choice.name",
        ),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "mcp_servers is not supported here"),
        ({"messages": said("x " * 3000)}, 400, "invalid_request_error", "3000 tokens"),
        ({"messages": said("missing")}, 503, "overloaded_error", "blocks 15:30"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_in_anthropics_form(served, body, status, kind, words, stream):
    response = posted(served, stream=stream, **body)
    assert response.status_code == status, response.text
    AnthropicError.model_validate(response.json(), strict=True)
    assert response.json()["error"]["type"] == kind
    assert words in response.json()["error"]["message"]
    assert ("retry-after" in response.headers) == (status == 503)


def test_other_errors_in_anthropics_form(served):
    crash = posted(served, messages=said("crash")).json()
    assert crash["error"] == {"type": "api_error", "message": "An error inside petals-win; its log has the details."}
    assert httpx.get(f"{served.url}{PATH}").json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(f"{served.url}{PATH}/batches").json()["error"]["type"] == "not_found_error"
    assert "type" in httpx.post(f"{served.url}{PATH}", content=b"{").json()
    assert "param" in httpx.post(f"{served.url}/v1/messagesandmore").json()["error"], "OpenAI's form"


def test_errors_before_the_routes_are_in_anthropics_form(monkeypatch):
    with serving(FakeEngine(), api_keys=("key",), max_body_bytes=1000, max_running=1, max_waiting=0) as served:
        fields: Any = {"model": MODEL, "max_tokens": 5}
        with pytest.raises(anthropic.AuthenticationError, match="This API key is not valid"):
            client_of(served, api_key="other").messages.create(messages=said("Hi"), **fields)
        client = client_of(served, api_key="key")
        with pytest.raises(anthropic.APIStatusError, match="larger than") as large:
            client.messages.create(messages=said("x" * 2000), **fields)
        assert (large.value.status_code, large.value.type) == (413, "request_too_large")
        origin = {"Origin": "https://evil.example"}
        with pytest.raises(anthropic.PermissionDeniedError, match="evil.example"):
            client.messages.create(messages=said("Hi"), extra_headers=origin, **fields)
        with client.messages.stream(messages=said("count 1000"), model=MODEL, max_tokens=1500):
            with pytest.raises(anthropic.RateLimitError) as refused:
                client.messages.create(messages=said("Hi"), **fields)
            assert refused.value.type == "rate_limit_error"
        assert eventually(lambda: served.engine.running == 0)


def test_keys_in_either_header():
    with serving(api_keys=("key",)) as served:
        for headers, status in [
            ({"x-api-key": "key"}, 200),
            ({"Authorization": "Bearer key"}, 200),
            ({"x-api-key": "other", "Authorization": "Bearer key"}, 200),
            ({"x-api-key": "other"}, 401),
            ({"x-api-key": ""}, 401),
            ({}, 401),
        ]:
            response = httpx.get(f"{served.url}/v1/models", headers=headers)
            assert response.status_code == status, headers
            if status == 401:
                problem = "is not valid" if headers.get("x-api-key") else "needs a key"
                assert problem in response.json()["error"]["message"]
        for given in ({"api_key": "key"}, {"auth_token": "key", "api_key": None}):
            message = client_of(served, **given).messages.create(model=MODEL, max_tokens=5, messages=said("say yes"))
            assert message.content[0].text == "yes"


def test_what_fails_in_the_middle_of_a_stream_raises_in_the_client(client, served):
    with pytest.raises(anthropic.APIStatusError, match="blocks 15:30") as raised:
        with client.messages.stream(model=MODEL, max_tokens=50, messages=said("break")) as stream:
            assert "".join(stream.text_stream) == ""
    assert raised.value.type == "overloaded_error"
    response = posted(served, messages=said("break"), stream=True)
    name, data = response.text.strip().split("\n\n")[-1].splitlines()
    assert name == "event: error"
    AnthropicError.model_validate(json.loads(data.removeprefix("data: ")), strict=True)


def test_pings_are_events(monkeypatch):
    monkeypatch.setattr(streaming, "PING_S", 0.05)
    monkeypatch.setattr(answering, "FIRST_EVENT_S", 0.01)
    with serving(FakeEngine(pace=0.4)) as served:
        response = posted(served, messages=said("say a b"), stream=True)
        assert response.text.count('event: ping\ndata: {"type":"ping"}\n\n') >= 1
        assert response.text.endswith('data: {"type":"message_stop"}\n\n')
        with client_of(served).messages.stream(model=MODEL, max_tokens=5, messages=said("say a b")) as stream:
            assert stream.get_final_text() == "a b"


def test_a_client_that_goes_away_ends_the_answer(client, served):
    with client.messages.stream(model=MODEL, max_tokens=1500, messages=said("count 1000")) as stream:
        next(stream.text_stream)
    assert eventually(lambda: served.engine.cancelled == 1)


def test_tokens_are_counted(client, served):
    fields: Any = {"model": "fake-model", "messages": said("one two three"), "system": "Be brief.", "tools": [TOOL]}
    assert client.messages.count_tokens(**fields).input_tokens == 3
    [(request, _)] = served.engine.tokenized
    assert request.messages[0] == {"role": "system", "content": "Be brief."}
    assert request.tools[0]["function"]["name"] == "weather"
    assert served.engine.requests == []
    with pytest.raises(anthropic.NotFoundError, match="no model 'other'"):
        client.messages.count_tokens(**{**fields, "model": "other"})


def test_what_is_sent_is_documented(served):
    responses = httpx.get(f"{served.url}/openapi.json").json()["paths"][PATH]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    for status in ("400", "401", "403", "404", "408", "413", "429", "500", "503"):
        [kind] = responses[status]["content"].values()
        assert kind["schema"] == {"$ref": "#/components/schemas/AnthropicError"}
