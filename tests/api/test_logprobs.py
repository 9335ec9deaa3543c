"""Log probabilities and echoes, as OpenAI's own Python client gets them."""

from __future__ import annotations

import pytest

from api.fake_engine import MODEL

# The scripted engine says that word number n has the log probability -n / 8, and that 🎉 consists of two tokens.


def ask(text):
    return [{"role": "user", "content": text}]


def test_of_a_chat(served):
    answer = served.client().chat.completions.create(
        model=MODEL, messages=ask("say a é 🎉"), logprobs=True, top_logprobs=3
    )
    assert served.engine.requests[0].logprobs == 3
    told = answer.choices[0].logprobs.content
    assert [entry.token for entry in told] == ["a", " é", "\\x20\\xf0\\x9f", "\\x8e\\x89"]
    assert b"".join(bytes(entry.bytes) for entry in told).decode() == answer.choices[0].message.content == "a é 🎉"
    assert [entry.logprob for entry in told] == [-0.125, -0.25, -0.375, -0.375]
    assert [(each.token, each.bytes, each.logprob) for each in told[0].top_logprobs] == [
        ("a", [97], -0.125),
        ("\\xff", [255], -9.0),
        ("t1000", [*b"t1000"], -9999.0),
    ]


def test_of_a_chat_without_others(served):
    answer = served.client().chat.completions.create(model=MODEL, messages=ask("say a"), logprobs=True)
    [entry] = answer.choices[0].logprobs.content
    assert (entry.token, entry.top_logprobs) == ("a", [])
    plain = served.client().chat.completions.create(model=MODEL, messages=ask("say a"))
    assert plain.choices[0].logprobs is None
    assert [request.logprobs for request in served.engine.requests] == [0, None]


def test_of_a_chat_as_a_stream(served):
    stream = served.client().chat.completions.create(
        model=MODEL, messages=ask("say a 🎉 STOP b"), logprobs=True, top_logprobs=1, stop=" STOP", stream=True
    )
    pieces = [(chunk.choices[0].delta.content, chunk.choices[0].logprobs) for chunk in stream]
    said = [(text, [entry.token for entry in told.content]) for text, told in pieces if told is not None]
    assert said == [("a", ["a"]), (" 🎉", ["\\x20\\xf0\\x9f", "\\x8e\\x89"])]
    assert [text for text, told in pieces if told is None] == ["", None], "the role, and the end"


def test_of_text_that_is_held_back(served):
    """A token is told with the text that begins with it, as late as that may be."""
    answer = served.client().chat.completions.create(
        model=MODEL, messages=ask("say a b c"), logprobs=True, stop=" b d"
    )
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["a", " b", " c"]
    cut = served.client().chat.completions.create(model=MODEL, messages=ask("say ab cd"), logprobs=True, stop="d")
    assert cut.choices[0].message.content == "ab c"
    assert [entry.token for entry in cut.choices[0].logprobs.content] == ["ab", " cd"]


def test_of_a_completion(served):
    answer = served.client().completions.create(model=MODEL, prompt="say a é 🎉 b", logprobs=2)
    told = answer.choices[0].logprobs
    assert told.tokens == ["a", " é", "bytes:\\x20\\xf0\\x9f", "bytes:\\x8e\\x89", " b"]
    assert told.token_logprobs == [-0.125, -0.25, -0.375, -0.375, -0.5]
    assert told.top_logprobs[0] == {"a": -0.125, "bytes:\\xff": -9.0}
    assert told.text_offset == [0, 1, 3, 4, 5]
    assert answer.choices[0].text[5:] == " b"


@pytest.mark.parametrize(("asked", "told"), [(0, {"a": -0.125}), (1, {"a": -0.125})])
def test_what_was_chosen_is_among_the_likeliest_of_a_completion(served, asked, told):
    answer = served.client().completions.create(model=MODEL, prompt="say a", logprobs=asked)
    assert answer.choices[0].logprobs.top_logprobs == [told]


def test_of_completions_as_a_stream(served):
    stream = served.client().completions.create(model=MODEL, prompt=["say a é b", "say c"], logprobs=0, stream=True)
    offsets = {0: [], 1: []}
    for chunk in stream:
        for choice in chunk.choices:
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert offsets == {0: [0, 1, 3], 1: [0]}


def test_none_that_are_off(served):
    body = {"logprobs": False}
    answer = served.client().completions.create(model=MODEL, prompt="say a", extra_body=body)
    assert answer.choices[0].logprobs is None and served.engine.requests[0].logprobs is None


def test_echo(served):
    client = served.client()
    answer = client.completions.create(model=MODEL, prompt=["say a", "say b "], echo=True, n=2)
    assert [choice.text for choice in answer.choices] == ["say aa", "say aa", "say b b", "say b b"]
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model=MODEL, prompt=["say a", "say b "], echo=True, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "say aa", 1: "say b b"}


@pytest.mark.parametrize(("best_of", "n"), [(1, 1), (2, 2), (1, 2), (None, 2)])
def test_best_of_as_many_as_are_sent(served, best_of, n):
    assert len(served.client().completions.create(model=MODEL, prompt="Hi", best_of=best_of, n=n).choices) == n
