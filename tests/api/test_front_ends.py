"""What front-ends and libraries made for other servers send: fields, limits that are off, histories with tools, names."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from api.fake_engine import MODEL
from api.serving import Served
from petals_win.api import schemas
from petals_win.engines.base import GenerationRequest

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}


def asked(served: Served, **fields: Any) -> GenerationRequest:
    """The request that reaches the engine."""
    body = served.chat("say yes")
    body.update(fields)
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return served.engine.requests[-1]


@pytest.mark.parametrize(
    "sent",
    [
        # Open WebUI
        {
            "stream_options": {"include_usage": True},
            "stream": True,
            "chat_id": "local:1",
            "session_id": "s",
            "features": {"web_search": False},
            "background_tasks": {"title_generation": True},
            "keep_alive": "5m",
            "num_ctx": 2048,
        },
        # LM Studio's and llama.cpp's own
        {"max_tokens": -1, "temperature": 0.7, "cache_prompt": True, "repeat_penalty": 1.1, "id_slot": -1},
        {"n_predict": -1, "samplers": ["top_k", "min_p"], "min_p": 0.05, "typical_p": 1, "mirostat": 0, "grammar": ""},
        # SillyTavern
        {
            "logit_bias": {},
            "presence_penalty": 0,
            "frequency_penalty": 0.2,
            "top_k": 0,
            "top_a": 0,
            "seed": -1,
            "stop": [],
            "user_name": "Ada",
            "char_name": "Bob",
            "reasoning_effort": "medium",
            "enable_web_search": False,
            "logprobs": None,
        },
        # Continue, LangChain, AI SDK, LiteLLM
        {"prediction": {"type": "content", "content": "x"}, "max_tokens": 4096, "stop": ["</s>"], "raw": True},
        {"n": 1, "parallel_tool_calls": True, "tools": [], "stream": False, "logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text"}, "tool_choice": "auto", "store": False, "metadata": {}, "user": ""},
        {"drop_params": True, "api_base": "x", "functions": [], "function_call": "none", "modalities": ["text"]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        # vLLM and garak
        {
            "chat_template_kwargs": {"enable_thinking": False},
            "min_tokens": 0,
            "ignore_eos": False,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": False,
            "include_stop_str_in_output": False,
            "echo": False,
            "best_of": None,
            "use_beam_search": False,
            "guided_json": None,
            "prompt_logprobs": 0,
            "add_special_tokens": False,
            "priority": 0,
        },
        # Ollama
        {"options": {"num_ctx": 4096}, "think": False, "format": "", "raw": False, "truncate": True},
    ],
)
def test_what_front_ends_send_is_answered(served, sent):
    body = {**served.chat("say yes"), **sent}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert "yes" in response.text


def test_what_is_ignored_is_named_once(served, caplog, monkeypatch):
    monkeypatch.setattr(schemas, "_named", set())
    caplog.set_level(logging.INFO)
    for _ in range(3):
        asked(served, made_up=1, options={"num_ctx": 1}, user="me", max_token=5)
    for name, times in (("made_up", 1), ("options", 1), ("max_token", 1), ("'user'", 0)):
        assert sum(name in message for message in caplog.messages) == times, name


def test_made_up_names_do_not_fill_the_log(served, caplog, monkeypatch):
    monkeypatch.setattr(schemas, "_named", set())
    caplog.set_level(logging.INFO)
    asked(served, **{f"name{number}\n": number for number in range(1000)}, **{"\u2028" + "x" * 10_000: 1})
    ignored = [message for message in caplog.messages if "is ignored" in message]
    assert 0 < len(ignored) <= 100
    assert all("\n" not in message and len(message) < 200 for message in ignored)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        # As long as fits: LM Studio, llama.cpp and Ollama say -1 and -2, an unset field of many front-ends is 0.
        ({"max_tokens": -1}, {"max_tokens": None}),
        ({"max_tokens": -2}, {"max_tokens": None}),
        ({"max_tokens": 0}, {"max_tokens": None}),
        ({"max_completion_tokens": -1, "max_tokens": 5}, {"max_tokens": None}),
        ({"max_completion_tokens": None, "max_tokens": 5}, {"max_tokens": 5}),
        ({"n_predict": 7}, {"max_tokens": 7}),
        ({"num_predict": -1}, {"max_tokens": None}),
        ({"max_new_tokens": 7, "max_tokens": 6}, {"max_tokens": 6}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": 0}),
        ({"top_p": 1}, {"top_p": 1}),
        ({"min_p": 0}, {"min_p": 0}),
        ({"repetition_penalty": 0}, {"repetition_penalty": 1}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 1}),
        ({"repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repeat_penalty": 1.3, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -1, "n": 2}, {"seed": None}),
        ({"seed": -2}, {"seed": -2}),
        ({"stop": ""}, {"stop": ()}),
        ({"stop": ["", "a"]}, {"stop": ("a",)}),
        ({"stop": None}, {"stop": ()}),
        ({"temperature": 1e-38}, {"temperature": 1e-38}),
        ({"frequency_penalty": 0.2, "presence_penalty": -2}, {"frequency_penalty": 0.2, "presence_penalty": -2}),
        ({"logit_bias": {"50": -100, "7": 1.5}}, {"logit_bias": {50: -100, 7: 1.5}}),
        ({"logit_bias": []}, {"logit_bias": {}}),
        ({"min_tokens": 3, "ignore_eos": True}, {"min_tokens": 3, "ignore_eos": True}),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "a": [1]}, "reasoning_effort": "low"},
            {"template": {"enable_thinking": False, "a": [1], "reasoning_effort": "low"}},
        ),
        ({"enable_thinking": True}, {"template": {"enable_thinking": True}}),
    ],
)
def test_limits_and_spellings_of_other_servers(served, sent, expected):
    request = asked(served, **sent)
    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(("sent", "tokens"), [({}, 16), ({"max_tokens": 0}, 40), ({"max_tokens": -1}, 40)])
def test_a_completion_as_long_as_fits(served, sent, tokens):
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": MODEL, "prompt": "count 40", **sent}).json()
    assert answer["usage"]["completion_tokens"] == tokens


def test_a_history_with_tools(served):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Sun?", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "function_call": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "say clear"}]},
    ]
    answer = served.client().chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "clear"
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    assert served.engine.requests[-1].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sun?", "name": "ada"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "say clear", "tool_call_id": "call_1", "name": "weather"},
    )


def test_a_history_with_functions_as_they_were_before_tools(served):
    called = {"name": "weather", "arguments": "{}"}
    request = asked(
        served,
        messages=[
            {"role": "assistant", "function_call": called},
            {"role": "function", "name": "weather", "content": "say clear"},
        ],
    )
    assistant, result = request.messages or ()
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}
    assert result == {"role": "tool", "name": "weather", "content": "say clear"}


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ("[1]", "[1]"),
        ("a{", "a{"),
        ("[" * 9999,) * 2,
    ],
)
def test_arguments_are_an_object_if_they_can_be(served, arguments, read):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    request = asked(
        served, messages=[{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "say x"}]
    )
    assert (request.messages or ())[0]["tool_calls"][0]["function"]["arguments"] == read


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": []}, {"content": ""}])
def test_an_assistant_that_said_nothing(served, message):
    user = {"role": "user", "content": "say yes"}
    request = asked(served, messages=[user, {"role": "assistant", **message}, user])
    assert (request.messages or ())[1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "content", ["say yes", ["say yes"], [{"type": "text", "text": "say "}, {"type": "text", "text": "yes"}]]
)
def test_content_as_text_or_parts(served, content):
    assert (asked(served, messages=[{"role": "user", "content": content}]).messages or ())[0]["content"] == "say yes"


BEGUN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "say yes"}]


@pytest.mark.parametrize(
    ("sent", "continued", "begins"),
    [
        ({}, False, True),
        ({"messages": BEGUN}, True, True),
        ({"messages": BEGUN, "continue_final_message": False}, False, True),
        ({"messages": BEGUN, "add_generation_prompt": True}, False, True),
        ({"messages": BEGUN, "add_generation_prompt": False}, True, False),
        ({"messages": BEGUN, "add_generation_prompt": False, "continue_final_message": True}, True, False),
        ({"continue_final_message": True}, True, True),
        ({"add_generation_prompt": False}, False, False),
        ({"messages": [{"role": "assistant", "content": "say it", "tool_calls": [CALL]}]}, False, True),
    ],
)
def test_whether_a_turn_is_continued(served, sent, continued, begins):
    request = asked(served, **sent)
    assert request.continue_final is continued
    assert continued or request.generation_prompt is begins


@pytest.mark.parametrize("name", ["made-up/fake-model", "Made-Up/Fake-Model", "fake-model", "FAKE-MODEL"])
def test_names_of_the_model(served, name):
    client = served.client()
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert answer.model == MODEL, "the name that /v1/models lists"
    chunks = client.completions.create(model=name, prompt="Hi", stream=True)
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert httpx.get(f"{served.url}/v1/models/{name}").json()["id"] == MODEL
    assert {request.model for request in served.engine.requests} == {MODEL}


@pytest.mark.parametrize("name", ["other/fake-model", "fake", "made-up", "made-up/", "/", " "])
def test_names_of_no_model(served, name):
    for response in (
        httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi") | {"model": name}),
        httpx.get(f"{served.url}/v1/models/{name}"),
    ):
        assert response.status_code == 404
        assert f"Ask for one of: {MODEL}." in response.json()["error"]["message"]
    assert served.engine.requests == []
