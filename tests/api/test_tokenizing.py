"""/tokenize and /detokenize."""

from __future__ import annotations

import json

import httpx
import pytest

from api.fake_engine import MODEL


def tokenize(served, **body):
    return httpx.post(f"{served.url}/tokenize", content=json.dumps(body), headers={"Content-Type": "application/json"})


def test_a_text_to_tokens_and_back(served):
    answer = tokenize(served, model=MODEL, prompt="say yes  Köln 😀").json()
    assert answer["count"] == len(answer["tokens"]) == 4
    assert answer["max_model_len"] == served.engine.context_length
    assert answer["token_strs"] is None
    back = httpx.post(f"{served.url}/detokenize", json={"model": MODEL, "tokens": answer["tokens"]}).json()
    assert back["prompt"] == back["content"] == "say yes  Köln 😀"


def test_the_text_of_each_token(served):
    assert tokenize(served, prompt="one two", return_token_strs=True).json()["token_strs"] == ["one", " two"]


def test_special_tokens_are_as_asked_for(served):
    for body, special in (
        ({"prompt": "x"}, True),
        ({"prompt": "x", "add_special_tokens": True}, True),
        ({"prompt": "x", "add_special_tokens": False}, False),
        ({"content": "x"}, False),  # llama.cpp's default
        ({"content": "x", "add_special": True}, True),
    ):
        assert tokenize(served, **body).status_code == 200
        request, asked = served.engine.tokenized[-1]
        assert (request.prompt, asked) == ("x", special), body


def test_a_conversation_is_read_as_in_a_chat(served):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    variables = {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
    assert tokenize(served, model=MODEL, messages=messages, **variables).json()["count"] == 2
    request, _ = served.engine.tokenized[-1]
    assert [turn["content"] for turn in request.messages] == ["one", "two three"]
    assert request.template == {"enable_thinking": False} and not request.generation_prompt


def test_an_empty_text(served):
    assert tokenize(served, prompt="").json()["tokens"] == []
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": []}).json()["prompt"] == ""


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "Either prompt or messages"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "Either prompt or messages"),
        ({"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, 400, "add_special_tokens"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role"),
        ({"content": "x", "with_pieces": True}, 400, "with_pieces"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"prompt": "x", "model": "other"}, 404, "There is no model 'other'"),
    ],
)
def test_what_cannot_be_read(served, body, status, said):
    answer = tokenize(served, **body)
    assert answer.status_code == status and said in answer.json()["error"]["message"]


@pytest.mark.parametrize("tokens", [[7], [-1], [2**31], [1.5], ["x"], [True], "x", None])
def test_what_are_no_tokens(served, tokens):
    answer = httpx.post(f"{served.url}/detokenize", json={"tokens": tokens})
    assert answer.status_code == 400 and "token" in answer.json()["error"]["message"]
