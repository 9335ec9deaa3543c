"""/v1/responses through OpenAI's own client: text, tools, structured output, thoughts; whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.engines.base import Constraint, GenerationRequest

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CLOCK: Any = {"type": "function", "name": "clock", "parameters": None, "strict": None}


def create(served: Served, given: Any, **fields: Any) -> Any:
    return served.client().responses.create(model=MODEL, input=given, **fields)


def streamed(served: Served, given: Any, **fields: Any) -> list[Any]:
    told = list(create(served, given, stream=True, **fields))
    assert [event.sequence_number for event in told] == list(range(len(told)))
    return told


def asked(served: Served, **body: Any) -> GenerationRequest:
    """The request that reaches the engine."""
    answer = httpx.post(f"{served.url}/v1/responses", json={"model": MODEL, "input": "say yes", **body})
    assert answer.status_code == 200, answer.text
    return served.engine.requests[-1]


def refused(served: Served, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{served.url}/v1/responses", json={"model": MODEL, "input": "say yes", **body})
    assert answer.status_code == 400, answer.text
    assert served.engine.requests == []
    return answer.json()["error"]


def test_a_text(served):
    answer = create(served, "say yes  indeed", instructions="Be brief.", metadata={"for": "test"}, temperature=0.5)
    assert (answer.status, answer.output_text, answer.model) == ("completed", "yes indeed", MODEL)
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.metadata == {"for": "test"} and answer.temperature == 0.5 and answer.store is False
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    (request,) = served.engine.requests
    assert [turn["role"] for turn in request.messages] == ["system", "user"]
    assert request.temperature == 0.5


def test_a_text_as_it_comes(served):
    told = streamed(served, "say yes indeed")
    assert [event.type for event in told] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.delta for event in told[4:6]] == ["yes", " indeed"] and told[6].text == "yes indeed"
    assert told[2].item.content == [] and told[2].item.status == "in_progress"
    assert told[7].part.text == "yes indeed" and told[8].item.status == "completed"
    last = told[-1].response
    assert last.output_text == "yes indeed" and last.usage.output_tokens == 2
    assert len({event.response.id for event in (told[0], told[1], told[-1])}) == 1
    assert {event.item_id for event in told[3:8]} == {told[2].item.id} == {last.output[0].id}


def test_the_clients_own_stream(served):
    with served.client().responses.stream(model=MODEL, input="say yes indeed") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == stream.get_final_response().output_text == "yes indeed"


def test_an_answer_that_is_cut_off(served):
    whole = create(served, "count 50", max_output_tokens=3)
    assert (whole.status, whole.output_text) == ("incomplete", "1 2 3")
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[0].status == "incomplete"
    *_, last = streamed(served, "count 50", max_output_tokens=3)
    assert last.type == "response.incomplete" and last.response.incomplete_details.reason == "max_output_tokens"


def test_calls_of_tools(served):
    given = 'call weather {"city":"Köln"} clock {} | I look.'
    whole = create(served, given, tools=[WEATHER, CLOCK])
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    _, weather, clock = whole.output
    assert (weather.name, weather.arguments, weather.status) == ("weather", '{"city":"Köln"}', "completed")
    assert clock.call_id != weather.call_id and clock.arguments == "{}"
    told = streamed(served, given, tools=[WEATHER, CLOCK])
    calls = [event for event in told if "function_call" in event.type]
    assert "".join(event.delta for event in calls[:2]) == calls[2].arguments == '{"city":"Köln"}'
    assert calls[2].type == "response.function_call_arguments.done" and calls[2].output_index == 1
    done = [event.item for event in told if event.type == "response.output_item.done"]
    assert [item.type for item in done] == ["message", "function_call", "function_call"]
    assert [item.id for item in told[-1].response.output] == [item.id for item in done]
    request, _ = served.engine.requests
    assert [tool["function"]["name"] for tool in request.tools] == ["weather", "clock"]
    assert request.tools[0] == {
        "type": "function",
        "function": {name: WEATHER[name] for name in ("name", "description", "parameters")},
    }
    assert request.tool_choice == "auto" and request.parallel_tool_calls


def test_the_way_back_of_a_call(served):
    """As programs do it: the output of one response and the results are the next one's input."""
    first = create(served, 'call weather {"city":"Köln"}', tools=[WEATHER])
    (call,) = first.output
    items = [{"role": "user", "content": "Is it raining?"}, *first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "say no"})
    answer = create(served, items, tools=[WEATHER])
    assert answer.output_text == "no"
    user, assistant, tool = served.engine.requests[-1].messages
    assert assistant == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
        ],
    }
    assert tool == {"role": "tool", "content": "say no", "tool_call_id": call.call_id, "name": "weather"}


def test_thoughts(served):
    whole = create(served, "think hm well | yes", reasoning={"effort": "low"})
    reasoning, message = whole.output
    assert (reasoning.type, reasoning.content[0].text, whole.output_text) == ("reasoning", "hm well ", "yes")
    assert served.engine.requests[-1].template == {"reasoning_effort": "low"}
    told = streamed(served, "think hm well | yes")
    assert [event.type.removeprefix("response.") for event in told[2:8]] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
    ]
    assert told[6].text == "hm well " and told[7].part.type == "reasoning_text"
    # What was thought is no part of what is asked next.
    create(served, [{"role": "user", "content": "a"}, *whole.output, {"role": "user", "content": "say b"}])
    assert [turn["content"] for turn in served.engine.requests[-1].messages] == ["a", "yes", "say b"]


class Point(BaseModel):
    x: int
    y: int


def test_structured_output(served):
    parsed = served.client().responses.parse(model=MODEL, input='say {"x":1,"y":2}', text_format=Point)
    assert parsed.output_parsed == Point(x=1, y=2)
    constraint = served.engine.requests[-1].constraint
    assert constraint.kind == "json_schema" and set(json.loads(constraint.text)["properties"]) == {"x", "y"}
    with served.client().responses.stream(model=MODEL, input='say {"x":1,"y":2}', text_format=Point) as stream:
        assert stream.get_final_response().output_parsed == Point(x=1, y=2)


def test_formats(served):
    assert asked(served, text={"format": {"type": "text"}}).constraint is None
    assert asked(served, text={"verbosity": "low"}).constraint is None
    anything = asked(served, text={"format": {"type": "json_object"}}).constraint
    assert anything == Constraint("json_schema", '{"type": "object"}')
    assert (
        refused_after(served, text={"format": {"type": "json_schema", "name": "x"}})["param"] == "text.format.schema"
    )


def refused_after(served: Served, **body: Any) -> dict[str, Any]:
    served.engine.requests.clear()
    return refused(served, **body)


@pytest.mark.parametrize(
    ("choice", "names", "expected"),
    [
        ("none", ["weather", "clock"], "none"),
        ("required", ["weather", "clock"], "required"),
        ({"type": "function", "name": "clock"}, ["clock"], "clock"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]},
            ["clock"],
            "required",
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, [], "auto"),
    ],
)
def test_choices_of_tools(served, choice, names, expected):
    request = asked(served, tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False)
    assert ([tool["function"]["name"] for tool in request.tools], request.tool_choice) == (names, expected)
    assert not request.parallel_tool_calls


def test_items(served):
    request = asked(
        served,
        instructions="First.",
        input=[
            {"role": "developer", "content": "Second."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say "}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "one"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "no JSON"},
            {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "b",
                "output": [{"type": "input_text", "text": "say 2"}],
            },
        ],
    )
    system, user, assistant, tool = request.messages
    assert system == {"role": "system", "content": "First.\n\nSecond."}
    assert user["content"] == "say " and assistant["content"] == "one"
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == ["no JSON", {}]
    assert (tool["content"], tool["name"]) == ("say 2", "g")
    assert not request.continue_final


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no answers are stored here"),
        ({"conversation": "conv_1"}, "conversation", "no answers are stored here"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "stored"),
        ({"background": True}, "background", "not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [WEATHER, {"type": "function"}]}, "tools[1].name", "text"),
        ({"tools": [{**CLOCK, "parameters": "x"}]}, "tools[0].parameters", "schema"),
        ({"tool_choice": "required"}, "tool_choice", "no tool"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "no tool 'x'"),
        ({"tools": [CLOCK], "tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search'"),
        ({"input": []}, "input", "no message"),
        ({"input": [{"role": "system", "content": "x"}]}, "input", "no message"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role", "assistant"),
        ({"input": [{"text": "x"}]}, "input[0].type", "without a type"),
        ({"input": [{"role": "user"}]}, "input[0].content", "text"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "'input_image'"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": 1}]}, "input[0].name", "text"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "'computer_call'"),
        ({"n": 2}, "n", "one answer"),
        ({"temperature": 3}, "temperature", "less than or equal"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_schema"),
    ],
)
def test_what_cannot_be_had_is_named(served, body, param, said):
    error = refused(served, **body)
    assert error["param"] == param and said in error["message"]


def test_what_says_nothing_about_the_text_is_ignored(served):
    request = asked(
        served,
        store=True,
        include=["reasoning.encrypted_content"],
        service_tier="auto",
        truncation="auto",
        user="u",
        prompt_cache_key="k",
        stream_options={"include_obfuscation": False},
        previous_response_id=None,
        background=False,
        max_output_tokens=0,
    )
    assert request.max_tokens is None and request.tools == () and request.tool_choice == "auto"


def test_errors(served):
    with pytest.raises(openai.NotFoundError):
        served.client().responses.create(model="other", input="x")
    with pytest.raises(openai.InternalServerError) as broken:
        create(served, "break")
    assert broken.value.status_code == 503
    *_, last = streamed(served, "break")
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error" and "The swarm cannot answer" in last.response.error.message
    assert last.response.output[0].content[0].text == "two tokens"


def test_a_client_that_leaves_ends_its_answer():
    with serving(FakeEngine(pace=0.02)) as served:
        with create(served, "count 5000", stream=True) as stream:
            next(iter(stream))
        assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)
