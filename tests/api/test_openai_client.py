"""What OpenAI's own Python client gets from a real server."""

import openai
import pytest

from api.fake_engine import MODEL, FakeEngine
from api.serving import eventually, serving


def ask(text):
    return [{"role": "user", "content": text}]


def test_chat(served):
    answer = served.client().chat.completions.create(model=MODEL, messages=ask("Hello there"))
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "You said: Hello there")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 4, 6)


def test_chat_as_a_stream(served):
    chunks = list(served.client().chat.completions.create(model=MODEL, messages=ask("Grüße 你好 🎉"), stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: Grüße 你好 🎉"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) == 1 + 5 + 1, "one chunk for the role, one a token, one for the end"


def test_stream_with_usage(served):
    options = {"include_usage": True}
    stream = served.client().chat.completions.create(
        model=MODEL, messages=ask("Hi"), stream=True, stream_options=options
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (1, 3, 4)
    assert all(chunk.usage is None for chunk in chunks)


def test_what_was_there_of_the_prompt_is_in_the_usage(served):
    client, options = served.client(), {"include_usage": True}
    whole = client.chat.completions.create(model=MODEL, messages=ask("recall 2 of these"))
    assert (whole.usage.prompt_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (4, 2)
    *_, last = client.completions.create(model=MODEL, prompt="recall 3 x y", stream=True, stream_options=options)
    assert (last.usage.prompt_tokens, last.usage.prompt_tokens_details.cached_tokens) == (4, 3)
    several = client.completions.create(model=MODEL, prompt=["recall 2 z", "recall 1", "say a"], n=2)
    assert several.usage.prompt_tokens_details.cached_tokens == 3, "each prompt counts once"


def test_the_clients_own_stream_helper_puts_the_answer_together(served):
    with served.client().chat.completions.stream(model=MODEL, messages=ask("Hi")) as stream:
        assert stream.get_final_completion().choices[0].message.content == "You said: Hi"


def test_completion(served):
    answer = served.client().completions.create(model=MODEL, prompt="Once upon", max_tokens=3)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("You said: Once", "length")
    assert answer.usage.completion_tokens == 3


def test_completion_as_a_stream(served):
    chunks = list(served.client().completions.create(model=MODEL, prompt="Once", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "You said: Once"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completion_is_short_unless_asked_otherwise(served):
    client = served.client()
    assert client.completions.create(model=MODEL, prompt="count 40").usage.completion_tokens == 16
    assert client.completions.create(model=MODEL, prompt="count 40", max_tokens=40).usage.completion_tokens == 40


def test_several_prompts_and_choices_keep_their_order(served):
    answer = served.client().completions.create(model=MODEL, prompt=["say a", "say b"], n=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    assert answer.choices[0].text != answer.choices[1].text, "each choice draws anew"
    assert answer.usage.prompt_tokens == 4, "each prompt counts once"


def test_token_ids_as_prompt(served):
    client = served.client()
    assert client.completions.create(model=MODEL, prompt=[7, 8]).choices[0].text == "You said: #7 #8"
    assert len(client.completions.create(model=MODEL, prompt=[[7], [8, 9]]).choices) == 2
    assert [request.prompt for request in served.engine.requests] == [(7, 8), (7,), (8, 9)]


def test_several_choices_in_a_stream(served):
    stream = served.client().chat.completions.create(model=MODEL, messages=ask("Hi"), n=3, stream=True)
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {"You said: Hi"}


def test_sampling_reaches_the_engine(served):
    served.client().chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "a b STOP c"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        max_tokens=7,
        max_completion_tokens=9,
        stop="STOP",
        seed=3,
        user="somebody",
        metadata={"a": "b"},
        extra_body={"top_k": 40, "repetition_penalty": 1.1, "frequency_penalty": 0, "tools": None},
    )
    [request] = served.engine.requests
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say a b STOP c"},
    )
    assert (request.temperature, request.top_p, request.top_k, request.repetition_penalty) == (0.5, 0.9, 40, 1.1)
    assert (request.max_tokens, request.stop, request.seed) == (9, ("STOP",), 3)


def test_what_is_left_out_is_left_to_the_model(served):
    served.client().chat.completions.create(model=MODEL, messages=ask("Hi"))
    [request] = served.engine.requests
    assert (request.temperature, request.top_p, request.top_k, request.max_tokens, request.seed) == (None,) * 5


def test_stop_strings_end_the_answer(served):
    answer = served.client().chat.completions.create(model=MODEL, messages=ask("say a b STOP c"), stop=["x", " STOP"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("a b", "stop")


def test_models(served):
    client = served.client()
    [model] = client.models.list().data
    assert (model.id, model.object, model.created) == (MODEL, "model", 1_700_000_000)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.models.retrieve("other")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "text", "error", "code", "message"),
    [
        ("other", "Hi", openai.NotFoundError, "model_not_found", f"Ask for one of: {MODEL}"),
        (MODEL, "many " * 2000, openai.BadRequestError, "context_length_exceeded", "2000 tokens"),
        (MODEL, "missing", openai.InternalServerError, "swarm_unavailable", "blocks 15:30 of the model"),
    ],
)
def test_what_fails_before_the_first_token_has_its_own_status(served, stream, model, text, error, code, message):
    with pytest.raises(error, match=message) as caught:
        served.client().chat.completions.create(model=model, messages=ask(text), stream=stream)
    assert caught.value.code == code
    if code == "swarm_unavailable":
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["Retry-After"]) > 0


@pytest.mark.parametrize(("text", "message"), [("break", "blocks 15:30"), ("crash", "error inside petals-win")])
def test_what_fails_in_the_middle_of_a_stream_raises_in_the_client(served, text, message):
    stream = served.client().chat.completions.create(model=MODEL, messages=ask(text), stream=True)
    seen = ""
    with pytest.raises(openai.APIError, match=message):
        for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
    assert seen == "two tokens"


def test_a_defect_of_the_engine_is_logged_and_not_told(served, caplog):
    with pytest.raises(openai.InternalServerError) as caught:
        served.client().chat.completions.create(model=MODEL, messages=ask("crash"))
    assert "scripted defect" not in str(caught.value)
    assert "scripted defect" in caplog.text


def test_closing_a_stream_cancels_the_generation():
    with serving(FakeEngine(pace=0.01)) as served:
        stream = served.client().chat.completions.create(model=MODEL, messages=ask("count 1000"), stream=True)
        next(iter(stream))
        stream.close()
        assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)
        assert served.engine.completed == 0


@pytest.mark.parametrize(("text", "stream"), [("wait", True), ("wait", False), ("count 1000", False)])
def test_a_client_that_gives_up_waiting_cancels_the_generation(text, stream):
    # A pace above Windows' clock step of 16 ms: asyncio does not wait for less there.
    with serving(FakeEngine(pace=0.05)) as served:
        with pytest.raises(openai.APITimeoutError):
            served.client().with_options(timeout=3).chat.completions.create(
                model=MODEL, messages=ask(text), stream=stream
            )
        assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)


def test_keys():
    with serving(api_keys=("first-key", "second-key")) as served:
        for key in ("first-key", "second-key"):
            assert served.client(key).models.list().data
        for key in ("third-key", "first-ke", "first-key2"):
            with pytest.raises(openai.AuthenticationError, match="not valid") as caught:
                served.client(key).chat.completions.create(model=MODEL, messages=ask("Hi"))
            assert caught.value.code == "invalid_api_key"
            assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"
            assert key not in str(caught.value)
        assert served.engine.requests == []
