"""Tools, thoughts and the older functions, as OpenAI's own Python client sends and gets them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from api.fake_engine import MODEL
from api.serving import Served

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
CALLS = 'call weather {"city":"Köln"} time {}'


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def sent(served: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream of chat chunks."""
    response = httpx.post(f"{served.url}/v1/chat/completions", json={**body, "stream": True})
    *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_calls(served):
    answer = served.client().chat.completions.create(model=MODEL, messages=ask(CALLS), tools=TOOLS)
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content, choice.message.function_call) == ("tool_calls", None, None)
    weather, time = choice.message.tool_calls
    assert (weather.id, weather.type, weather.function.name) == ("call_0", "function", "weather")
    assert json.loads(weather.function.arguments) == {"city": "Köln"}
    assert (time.id, time.function.name, time.function.arguments) == ("call_1", "time", "{}")


def test_text_before_calls(served):
    answer = served.client().chat.completions.create(model=MODEL, messages=ask("call time {} | I look"), tools=TOOLS)
    assert (answer.choices[0].message.content, len(answer.choices[0].message.tool_calls)) == ("I look", 1)
    first, *_ = sent(served, served.chat("call time {} | I look"))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_without_calls_there_are_none(served):
    answer = served.client().chat.completions.create(model=MODEL, messages=ask("say yes"), tools=TOOLS)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.tool_calls) == ("stop", None)


def test_calls_in_a_stream(served):
    choices = [chunk["choices"][0] for chunk in sent(served, served.chat(CALLS, tools=TOOLS))]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": None},
        {
            "tool_calls": [
                {"index": 0, "id": "call_0", "type": "function", "function": {"name": "weather", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"c'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ity":"Köln"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "call_1", "type": "function", "function": {"name": "time", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["tool_calls"]


def test_the_clients_own_stream_helper_puts_calls_together(served):
    with served.client().chat.completions.stream(model=MODEL, messages=ask(CALLS), tools=TOOLS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("weather", '{"city":"Köln"}'),
        ("time", "{}"),
    ]


def test_what_the_engine_is_told_of_tools(served):
    served.client().chat.completions.create(model=MODEL, messages=ask("Hi"), tools=TOOLS, parallel_tool_calls=False)
    served.client().chat.completions.create(model=MODEL, messages=ask("Hi"))
    first, second = served.engine.requests
    weather = {name: value for name, value in TOOLS[0]["function"].items() if name != "strict"}
    assert first.tools == ({"type": "function", "function": weather}, TOOLS[1])
    assert (first.tool_choice, first.parallel_tool_calls) == ("auto", False)
    assert (second.tools, second.tool_choice, second.parallel_tool_calls) == ((), "auto", True)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("none", "none"),
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "time"}}, "time"),
    ],
)
def test_what_the_engine_is_told_of_the_choice(served, choice, told):
    served.client().chat.completions.create(model=MODEL, messages=ask("Hi"), tools=TOOLS, tool_choice=choice)
    [request] = served.engine.requests
    assert request.tool_choice == told and len(request.tools) == 2


FUNCTIONS: list[Any] = [tool["function"] for tool in TOOLS]


@pytest.mark.parametrize(("choice", "told"), [("none", "none"), ("auto", "auto"), ({"name": "time"}, "time")])
def test_functions_as_they_were_before_tools(served, choice, told):
    answer = served.client().chat.completions.create(
        model=MODEL, messages=ask('call time {"a":1}'), functions=FUNCTIONS, function_call=choice
    )
    [request] = served.engine.requests
    assert [tool["function"]["name"] for tool in request.tools] == ["weather", "time"]
    assert (request.tool_choice, request.parallel_tool_calls) == (told, False)
    [got] = answer.choices
    assert (got.finish_reason, got.message.content, got.message.tool_calls) == ("function_call", None, None)
    assert (got.message.function_call.name, got.message.function_call.arguments) == ("time", '{"a":1}')


def test_functions_in_a_stream(served):
    chunks = sent(served, served.chat('call time {"a":1}', functions=FUNCTIONS))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:]] == [
        {"function_call": {"name": "time", "arguments": ""}},
        {"function_call": {"arguments": '{"a'}},
        {"function_call": {"arguments": '":1}'}},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_thoughts(served):
    message = (
        served.client().chat.completions.create(model=MODEL, messages=ask("think of it | yes")).choices[0].message
    )
    assert (message.content, message.reasoning_content, message.reasoning) == ("yes", "of it ", "of it ")
    deltas = [chunk["choices"][0]["delta"] for chunk in sent(served, served.chat("think of it | yes"))]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "of ", "reasoning": "of "},
        {"reasoning_content": "it ", "reasoning": "it "},
        {"content": "yes"},
        {},
    ]
    plain = served.client().chat.completions.create(model=MODEL, messages=ask("say yes")).choices[0].message
    assert not hasattr(plain, "reasoning_content")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_in_a_history(served, name):
    messages = [{"role": "assistant", "content": "No", name: "Hm"}, *ask("say yes")]
    served.client().chat.completions.create(model=MODEL, messages=messages)
    assert served.engine.requests[0].messages[0] == {"role": "assistant", "content": "No", "reasoning_content": "Hm"}


def test_a_text_that_is_continued_has_no_thoughts(served):
    client = served.client()
    assert client.completions.create(model=MODEL, prompt="think of | it").choices[0].text == "of it"
    stream = client.completions.create(model=MODEL, prompt="think of | it", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "of it"


def test_usage_in_each_event(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = sent(served, served.chat("recall 2", stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [1, 1, 2, 3, 4, 4], "the role, each token, and the end"
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    assert all(chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": 2} for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == chunks[-1]["usage"]
    assert last["usage"]["total_tokens"] == 6


def test_usage_of_several_choices_in_each_event(served):
    options = {"continuous_usage_stats": True}
    chunks = sent(served, served.chat("say a b", n=2, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}
    assert all(chunk["choices"] for chunk in chunks), "no last event, which include_usage is for"


def test_tokens_that_end_the_answer(served):
    served.client().chat.completions.create(model=MODEL, messages=ask("Hi"), extra_body={"stop_token_ids": [5, 7]})
    served.client().completions.create(model=MODEL, prompt="Hi", extra_body={"stop_token_ids": [9]})
    assert [request.stop_tokens for request in served.engine.requests] == [(5, 7), (9,)]
