"""The bytes: server-sent events, error bodies, refusals of bad requests, health and readiness."""

import json
import socket

import httpx
import pytest

import petals_win
from api.fake_engine import MODEL, FakeEngine
from api.serving import eventually, serving
from petals_win.api import answering, streaming


def events_of(body: str) -> list[str]:
    assert body.endswith("\n\n")
    assert "\r" not in body
    return [event.removeprefix("data: ") for event in body.removesuffix("\n\n").split("\n\n")]


def error_of(response: httpx.Response) -> dict:
    """The error of a response, checked for OpenAI's shape."""
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    assert error["message"][0].isupper() or error["param"], "a sentence, or it begins with the name of the field"
    assert error["message"].endswith(".")
    return error


def test_a_chat_stream(served):
    response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("say é", stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no", "nginx would keep the tokens back"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    first, second, third = (json.loads(chunk) for chunk in chunks)
    assert first.pop("id").startswith("chatcmpl-")
    assert isinstance(first.pop("created"), int)
    assert first == {
        "object": "chat.completion.chunk",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert second["choices"][0]["delta"] == {"content": "é"}
    assert third["choices"][0]["delta"] == {}
    assert third["choices"][0]["finish_reason"] == "stop"


def test_a_completion_stream_that_breaks_ends_with_the_error(served):
    body = {"model": MODEL, "prompt": "break", "stream": True}
    response = httpx.post(f"{served.url}/v1/completions", json=body)
    assert response.status_code == 200
    *chunks, error = [json.loads(event) for event in events_of(response.text)]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "two tokens"
    assert error["error"]["code"] == "swarm_unavailable"


def test_line_separators_of_unicode_end_no_line(served):
    prompt = "a\u2028b\u2029c\x85d"
    body = {"model": MODEL, "prompt": prompt, "echo": True, "stream": True}
    response = httpx.post(f"{served.url}/v1/completions", json=body)
    assert len(response.text.splitlines()) == 2 * len(events_of(response.text)), "one of data and an empty one each"
    assert json.loads(events_of(response.text)[0])["choices"][0]["text"] == prompt


def test_tokens_are_sent_as_they_come():
    with serving(FakeEngine(pace=0.2)) as served:
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json=served.chat("count 1000", stream=True)
        ) as response:
            lines = (line for line in response.iter_lines() if '"content":"1"' in line)
            next(lines)
        assert served.engine.completed == 0


def test_pings_keep_a_slow_stream_open(monkeypatch):
    monkeypatch.setattr(answering, "FIRST_EVENT_S", 0.1)
    monkeypatch.setattr(streaming, "PING_S", 0.1)
    with serving() as served:
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=served.chat("wait", stream=True)) as r:
            lines = r.iter_lines()
            assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        assert eventually(lambda: served.engine.cancelled == 1)


def test_an_error_after_the_stream_began_is_an_event(monkeypatch):
    monkeypatch.setattr(answering, "FIRST_EVENT_S", 0.05)
    with serving(FakeEngine(pace=0.5)) as served:
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("break", stream=True))
        assert json.loads(events_of(response.text)[-1])["error"]["code"] == "swarm_unavailable"


def chat(**fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}


TOOL = {"type": "function", "function": {"name": "f"}}


def named(name: str) -> dict:
    """The choice of a tool."""
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (chat(temperature="warm"), "temperature", "valid number"),
        (chat(temperature=3), "temperature", "less than or equal to 2"),
        (chat(max_tokens=-3), "max_tokens", "greater than or equal to -2"),
        (chat(n=99), "n", "less than or equal to 16"),
        (chat(seed=2**70), "seed", "less than"),
        (chat(stop=["a", 5]), "stop[1]", "valid string"),
        (chat(model="\udfff"), "model", "half of a surrogate"),
        (chat(stop="\udfff"), "stop[0]", "half of a surrogate"),
        (chat(tools=[{"type": "function"}]), "tools[0].function", "field required"),
        (
            chat(tools=[{"type": "function", "function": {"name": ""}}]),
            "tools[0].function.name",
            "at least 1 character",
        ),
        (chat(tools=[TOOL, {"type": "web_search"}]), "tools[1].type", "tools of type 'web_search' are not supported"),
        (chat(tools=[{"type": "custom", "custom": {"name": "x"}}]), "tools[0].type", "tools of type 'custom'"),
        (chat(tools=[TOOL] * 129), "tools", "at most 128 items"),
        (chat(tools=5), "tools", "valid list"),
        (chat(tools=[TOOL], tool_choice="any"), "tool_choice", '"required" or {"type": "function"'),
        (
            chat(tools=[TOOL], tool_choice={"type": "allowed_tools"}),
            "tool_choice",
            '"required" or {"type": "function"',
        ),
        (chat(tools=[TOOL], tool_choice=named("f2")), "tool_choice", "there is no function 'f2'"),
        (chat(tool_choice="required"), "tool_choice", "there is no function to call"),
        (chat(tool_choice=named("f")), "tool_choice", "there is no function 'f'"),
        (chat(functions=[{"name": "f"}], function_call="required"), "function_call", '"auto" or {"name": NAME}'),
        (chat(functions=[{"name": "f"}], function_call={"name": "g"}), "function_call", "there is no function 'g'"),
        (chat(function_call={"name": "g"}), "function_call", "there is no function 'g'"),
        (chat(parallel_tool_calls="some"), "parallel_tool_calls", "valid boolean"),
        (chat(logprobs=5), "logprobs", "valid boolean"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
        (chat(stop_token_ids=[-1]), "stop_token_ids[0]", "greater than or equal to 0"),
        (chat(stop_token_ids=5), "stop_token_ids", "valid list"),
        (chat(top_logprobs=3), "top_logprobs", "Set logprobs to true"),
        (chat(response_format={"type": "xml"}), "response_format.type", "'json_object'"),
        (chat(grammar=5), "grammar", "valid string"),
        (chat(format="yaml"), "format", "a JSON schema is needed"),
        (chat(guided_json={"type": "object"}, guided_regex="a"), "guided_regex", "exclude each other"),
        (chat(chat_template="{{ 1 }}"), "chat_template", "chat_template is not supported here"),
        (chat(frequency_penalty=2.1), "frequency_penalty", "less than or equal to 2"),
        (chat(repetition_penalty=1e-39), "repetition_penalty", "less than 0.01"),
        (chat(repeat_penalty=1e-39), "repetition_penalty", "less than 0.01"),
        (chat(min_p=1.1), "min_p", "less than or equal to 1"),
        (chat(top_k=-2), "top_k", "greater than or equal to -1"),
        (chat(logit_bias={"5": 101}), "logit_bias.5", "less than or equal to 100"),
        (chat(logit_bias={"5": float("nan")}), "logit_bias.5", "finite"),
        (chat(logit_bias={"-5": 1}), "logit_bias.-5.[key]", "greater than or equal to 0"),
        (chat(logit_bias=[[5, 1]]), "logit_bias", "valid dictionary"),
        (
            chat(continue_final_message=True, add_generation_prompt=True),
            "continue_final_message",
            "exclude each other",
        ),
        (chat(stream_options={"include_usage": "often"}), "stream_options.include_usage", "valid boolean"),
        ({"model": MODEL}, "messages", "field required"),
        (chat(model=None), "model", "field required"),
        (chat(messages=[]), "messages", "at least 1 item"),
        (chat(messages=[{"role": "critic", "content": "x"}]), "messages[0].role", "'system'"),
        (chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "field required"),
        (chat(messages=[{"role": "user", "content": "\ud800"}]), "messages[0].content", "half of a surrogate"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages[0].content",
            "and no images, sound or files, such as image_url",
        ),
        (
            chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}]),
            "messages[0].tool_calls[0].function",
            "field required",
        ),
    ],
)
def test_bad_chat_fields_are_named(served, body, param, message):
    content = json.dumps(body).encode()
    response = httpx.post(
        f"{served.url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert message in error["message"]
    assert served.engine.requests == []


def test_half_a_character_as_prompt(served):
    content = json.dumps({"model": MODEL, "prompt": ["a", "b\ud800"]}).encode()
    response = httpx.post(
        f"{served.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert "half of a surrogate" in error_of(response)["message"]


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], ["a", 5], [1, "a"], [-1], [True], [1.5], [[1], 2], {"a": 1}])
def test_bad_prompts(served, prompt):
    response = httpx.post(f"{served.url}/v1/completions", json={"model": MODEL, "prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "logprobs": 0},
        {"echo": True, "prompt": [1, 2]},
        {"suffix": "."},
        {"logprobs": 6},
        {"best_of": 2},
        {"best_of": 3, "n": 2},
        {"n": 2, "prompt": ["a"] * 9},
    ],
)
def test_unsupported_completion_fields(served, fields):
    response = httpx.post(f"{served.url}/v1/completions", json={"model": MODEL, "prompt": "a", **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == list(fields)[0]
    assert served.engine.requests == []


def test_fields_that_ask_for_nothing_are_accepted(served):
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "logprobs": False,
        "response_format": {"type": "text"},
        "presence_penalty": 0.0,
        "logit_bias": {},
        "store": True,
        "service_tier": "auto",
        "n": None,
        "stream": None,
        "stop": None,
    }
    response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi", **neutral))
    assert response.status_code == 200


def test_answers_of_openai_can_be_sent_back_as_messages(served):
    messages = [
        {"role": "user", "content": "Hi", "name": "me"},
        {"role": "assistant", "content": "Ho", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "say yes"},
    ]
    response = httpx.post(f"{served.url}/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert response.json()["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"model": "m",}', "application/json", "not valid JSON: "),
        (b"", "application/json", "must be a JSON object"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'"text"', "application/json", "must be a JSON object"),
        (b"[" * 100_000, "application/json", "cannot be read as JSON"),
        (b'{"model": "\xff"}', "application/json", "not UTF-8"),
        ('{"model": "Müller"}'.encode("latin-1"), "application/json", "Send the JSON encoded in UTF-8"),
        (json.dumps(chat()).encode("utf-16-le"), "text/plain", "sent with 'Content-Type: application/json'"),
        (json.dumps(chat()).encode(), "text/plain", "sent with 'Content-Type: application/json'"),
        (json.dumps(chat()).encode(), "text/json", "sent with 'Content-Type: application/json'"),
        (json.dumps(chat()).encode(), "", "sent with 'Content-Type: application/json'"),
        (b"model=m", "application/x-www-form-urlencoded", "sent with 'Content-Type: application/json'"),
    ],
)
def test_a_body_that_is_no_json_object(served, content, kind, message):
    response = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == (400 if kind == "application/json" else 415)
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"]
)
def test_content_types_of_json(served, kind):
    content = json.dumps(served.chat("say Grüße"), ensure_ascii=False).encode()
    response = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert response.json()["choices"][0]["message"]["content"] == "Grüße"


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "max_tokens", "repeat_penalty", "seed"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(served, field, value):
    content = json.dumps(chat()).removesuffix("}") + f', "{field}": {value}}}'
    response = httpx.post(
        f"{served.url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert "finite number" in error_of(response)["message"]
    assert error_of(response)["param"] == {"repeat_penalty": "repetition_penalty"}.get(field, field)


def test_whole_answers_are_ascii(served):
    """Windows PowerShell 5.1 takes JSON for Latin-1, unless a charset says otherwise."""
    assert httpx.get(f"{served.url}/v1/models").headers["content-type"] == "application/json; charset=utf-8"
    response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("say Grüße 你好 🎉"))
    assert response.content.decode("latin-1") == response.content.decode("ascii")
    assert json.loads(response.content)["choices"][0]["message"]["content"] == "Grüße 你好 🎉"
    response = httpx.get(f"{served.url}/v1/models/Grüße")
    assert response.content.isascii() and "Grüße" in error_of(response)["message"]


def test_unknown_routes_and_methods(served):
    response = httpx.post(f"{served.url}/v1/images/generations", json={})
    assert response.status_code == 404
    assert error_of(response)["message"].startswith("There is no POST /v1/images/generations here.")
    response = httpx.get(f"{served.url}/v1/chat/completions")
    assert response.status_code == 405
    assert "use POST" in error_of(response)["message"]


def test_a_defect_has_the_shape_of_an_error_and_tells_nothing(served, monkeypatch):
    monkeypatch.setattr(served.engine, "status", lambda: 1 / 0)
    response = httpx.get(f"{served.url}/ready")
    assert response.status_code == 500
    assert "zero" not in error_of(response)["message"]


def test_health(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "version": petals_win.__version__}


def test_ready():
    with serving() as served:
        response = httpx.get(f"{served.url}/ready")
        assert response.status_code == 200
        assert response.json()["ready"] is True
        assert response.json()["missing_blocks"] == []
    with serving(FakeEngine(missing_blocks=tuple(range(15, 30)))) as served:
        response = httpx.get(f"{served.url}/ready")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json() == {
            "ready": False,
            "detail": "No node serves blocks 15:30.",
            "missing_blocks": list(range(15, 30)),
            "peers": [
                {
                    "peer_id": "12D3KooWFakePeer",
                    "start_block": 0,
                    "end_block": 15,
                    "name": "gaming-pc",
                    "throughput": 123.5,
                    "cache_tokens_left": 4096,
                    "relayed": False,
                }
            ],
            "num_blocks": 30,
            "cache_usage": None,
            "workers": [],
            "engines": [],
        }
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_long_body_is_refused_before_it_is_read(served):
    body = served.chat("x" * (5 * 2**20))
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.status_code == 413
    assert "larger than 4 MiB" in error_of(response)["message"]
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    assert served.engine.requests == []


def test_a_long_body_of_unknown_length_is_refused():
    def pieces():
        for _ in range(10):
            yield b" " * 1000

    with serving(max_body_bytes=5000) as served:
        url = f"{served.url}/v1/completions"
        assert httpx.post(url, content=pieces()).status_code == 413
        body = json.dumps({"model": MODEL, "prompt": "Hi"}).encode()
        fits = httpx.post(url, content=iter([body[:9], body[9:]]), headers={"Content-Type": "application/json"})
        assert fits.json()["choices"][0]["text"] == "You said: Hi"


def test_a_body_that_never_ends_is_given_up(served, monkeypatch):
    monkeypatch.setattr("petals_win.api.guards.BODY_DEADLINE_S", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 408 ")


def test_docs_need_no_other_server(served):
    page = httpx.get(f"{served.url}/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    assert httpx.get(f"{served.url}/docs/swagger-ui.js").headers["content-type"].startswith("text/javascript")
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready"} <= set(paths)
