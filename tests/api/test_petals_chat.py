"""Front-ends and bots made for Petals: the WebSocket, and the three HTTP paths."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import websocket

from api.fake_engine import END, MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.api import petals_chat, petals_sessions, server

OPEN = {"type": "open_inference_session", "model": MODEL, "max_length": 1024}


class Chat:
    """A connection of a front-end."""

    def __init__(self, served: Served, **headers: str):
        url = f"ws://127.0.0.1:{served.port}/api/v2/generate"
        origin, host = headers.pop("Origin", None), headers.pop("Host", None)
        self.socket = websocket.create_connection(
            url, timeout=30, header=headers, origin=origin, host=host, suppress_origin=origin is None
        )

    def send(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def hear(self) -> dict[str, Any]:
        if not (heard := self.socket.recv()):
            raise websocket.WebSocketConnectionClosedException
        return json.loads(heard)

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.hear()

    def generate(self, **fields: Any) -> list[dict[str, Any]]:
        """All portions of an answer."""
        self.send(type="generate", **fields)
        told = [self.hear()]
        while told[-1]["ok"] and not told[-1]["stop"]:
            told.append(self.hear())
        return told


@contextlib.contextmanager
def chatting(served: Served, **opening: Any) -> Iterator[Chat]:
    chat = Chat(served)
    try:
        assert chat.ask(**{**OPEN, **opening}) == {"ok": True}
        yield chat
    finally:
        chat.socket.close()


def said(served: Served, request: int = -1) -> str:
    """What the engine was given."""
    return served.engine.text_of(served.engine.requests[request].prompt)


def test_one_answer_without_a_stop_sequence(served):
    with chatting(served) as chat:
        (answer,) = chat.generate(inputs="count 50", max_new_tokens=3)
        assert answer == {"ok": True, "outputs": "1 2 3", "stop": True, "token_count": 3}
        (answer,) = chat.generate(inputs="say yes indeed", max_length=100)
        assert answer["outputs"].split()[-1] == "indeed" or answer["stop"]
    assert served.engine.requests[0].temperature == 0


def test_a_chat_goes_on_from_where_it_stands(served):
    with chatting(served) as chat:
        chat.generate(inputs="count 50", max_new_tokens=2)
        (answer,) = chat.generate(inputs="\nsay one two three", max_new_tokens=2)
        assert answer["outputs"] == "one two"
        chat.generate(max_new_tokens=1)
    assert [said(served, number) for number in range(3)] == [
        "count 50",
        "count 501 2\nsay one two three",
        "count 501 2\nsay one two threeone two",
    ]
    # Only the first text of a session begins one.
    assert [special for request, special in served.engine.tokenized] == [True, False]


def test_portions_up_to_a_stop_sequence(served):
    with chatting(served) as chat:
        told = chat.generate(inputs="say a b c d ### e", max_new_tokens=2, stop_sequence="###")
        assert [(part["outputs"], part["stop"], part["token_count"]) for part in told] == [
            ("a b", False, 2),
            (" c d", False, 2),
            # The end of a portion is what counts, and this one goes on behind the stop sequence.
            (" ### e", False, 2),
            ("", True, 0),  # the model's own end
        ]
        told = chat.generate(inputs="\nsay a b ### c", max_new_tokens=1, stop_sequence="###")
        assert [part["outputs"] for part in told] == ["a", " b", " ###"] and told[-1]["stop"]
        chat.generate(max_new_tokens=1)
    assert said(served).endswith("\nsay a b ### ca b ###")
    assert served.engine.requests[1].max_tokens > 900, "one answer, not one for each portion"


def test_a_stop_sequence_of_one_token_ends_the_answer_at_once(served):
    with chatting(served) as chat:
        told = chat.generate(inputs="say a b </s> c", max_new_tokens=10, stop_sequence="</s>")
        assert told == [{"ok": True, "outputs": "a b</s>", "stop": True, "token_count": 3}]
        assert served.engine.requests[-1].stop_tokens == (END,)
        chat.generate(max_new_tokens=1)
    assert served.engine.requests[-1].prompt[-1] == END


def test_extra_stop_sequences(served):
    with chatting(served) as chat:
        extra = {"stop_sequence": "</s>", "extra_stop_sequences": ["Human:", "Bot:"]}
        told = chat.generate(inputs="say a Human: b", max_new_tokens=1, **extra)
        assert [(part["outputs"], part["stop"]) for part in told] == [("a", False), (" Human:", True)]
        chat.generate(max_new_tokens=1)
        # The next turn begins behind the token that ends a turn.
        assert said(served).endswith("b" + "a</s>")
        (refused,) = chat.generate(max_new_tokens=1, stop_sequence="two words", extra_stop_sequences=["x"])
        assert not refused["ok"] and "exactly one token, but it has 2" in refused["traceback"]
        (refused,) = chat.generate(max_new_tokens=1, extra_stop_sequences=["x"])
        assert not refused["ok"] and "a stop_sequence is needed" in refused["traceback"]


def test_tokens_without_a_text_are_held_back_and_counted(served):
    with chatting(served) as chat:
        told = chat.generate(inputs="say a ~ ~ b ###", max_new_tokens=1, stop_sequence="###")
        assert [(part["outputs"], part["token_count"]) for part in told] == [("a", 1), (" b", 3), (" ###", 1)]
        (answer,) = chat.generate(inputs="\nsay a ~", max_new_tokens=5)
        assert (answer["outputs"], answer["token_count"]) == ("a", 2)
        chat.generate(max_new_tokens=1)
        assert said(served).endswith("a ~"), "what had no text yet is part of the session, too"


def test_sampling(served):
    with chatting(served) as chat:
        chosen = {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
        chat.generate(inputs="say a", max_new_tokens=1, **chosen)
        chat.generate(inputs="say a", max_new_tokens=1, do_sample=1, **chosen)
        chat.generate(inputs="say a", max_new_tokens=1, do_sample=True)
        greedy, drawn, default = served.engine.requests
        assert (greedy.temperature, drawn.temperature, default.temperature) == (0, 0.6, None)
        assert (drawn.top_k, drawn.top_p, drawn.repetition_penalty) == (5, 0.9, 1.1)


def test_the_room_of_a_session(served):
    with chatting(served, max_length=10) as chat:
        (answer,) = chat.generate(inputs="count 50", max_length=4)
        assert answer["token_count"] == 2
        (refused,) = chat.generate(max_new_tokens=7)
        assert "room for 10 tokens, of which 4 are taken, so 7 more do not fit" in refused["traceback"]
        (refused,) = chat.generate(max_length=4)
        assert "4 tokens are too few" in refused["traceback"]
        *told, last = chat.generate(inputs="\ncount 50", max_new_tokens=3, stop_sequence="###")
        assert [part["token_count"] for part in told] == [3, 1] and not told[-1]["stop"]
        assert "used up before the stop sequence" in last["traceback"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"type": "generate", "inputs": "x"}, "max_length or max_new_tokens"),
        ({"type": "generate", "max_new_tokens": 1}, "nothing to go on from"),
        ({"type": "generate", "inputs": "x", "max_new_tokens": 0}, "max_new_tokens: input should be greater"),
        ({"type": "generate", "inputs": 1, "max_new_tokens": 1}, "inputs: input should be a valid string"),
        ({"type": "generate", "inputs": "\ud800", "max_new_tokens": 1}, "surrogate"),
        ({"type": "generate", "inputs": "missing", "max_new_tokens": 1}, "The swarm cannot answer now"),
        ({"type": "generate", "inputs": "crash", "max_new_tokens": 9}, "its log has the details"),
        ({"type": "train"}, "open_inference_session or generate"),
        ({}, "open_inference_session or generate"),
        (OPEN, "has a session already"),
    ],
)
def test_errors_are_sentences_and_the_session_stays(served, message, reason):
    with chatting(served) as chat:
        refused = chat.ask(**message)
        assert refused["ok"] is False and reason in refused["traceback"]
        assert "Traceback" not in refused["traceback"]
        assert chat.generate(inputs="\nsay yes", max_new_tokens=5)[-1]["outputs"] == "yes"


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        ({"model": "other"}, "There is no model 'other'"),
        ({"max_length": 10**6}, "1 to 2000 tokens"),
        ({"max_length": 0}, "1 to 2000 tokens"),
        ({"max_length": None}, "max_length: field required"),
        ({"model": None}, "model: field required"),
        ({"type": "generate", "inputs": "x", "max_new_tokens": 1}, "open_inference_session first"),
    ],
)
def test_sessions_that_do_not_open(served, opening, reason):
    chat = Chat(served)
    refused = chat.ask(**{**OPEN, **opening})
    assert refused["ok"] is False and reason in refused["traceback"]
    assert chat.ask(**OPEN) == {"ok": True}
    chat.socket.close()


@pytest.mark.parametrize("sent", ["no JSON", "[1]", "[" * 100_000])
def test_what_is_no_message(served, sent):
    with chatting(served) as chat:
        chat.socket.send(sent)
        assert "JSON object" in chat.hear()["traceback"]


def test_a_client_that_leaves_ends_its_answer():
    with serving(FakeEngine(pace=0.02)) as served:
        chat = Chat(served)
        chat.ask(**OPEN)
        chat.send(type="generate", inputs="count 1900", max_new_tokens=1, stop_sequence="###")
        assert chat.hear()["outputs"] == "1"
        chat.socket.close()
        assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)


def test_a_client_that_asks_without_waiting_is_stopped(served):
    with chatting(served) as chat:
        for _ in range(8):
            chat.send(type="generate", inputs="wait", max_new_tokens=1)
        assert "Wait for the answer" in chat.hear()["traceback"]
        with pytest.raises(websocket.WebSocketConnectionClosedException):
            chat.hear()


def test_answers_take_the_places_of_answers():
    with serving(max_running=1, max_waiting=0) as served, chatting(served) as one, chatting(served) as other:
        one.send(type="generate", inputs="wait", max_new_tokens=1)
        assert eventually(lambda: served.engine.running == 1)
        (refused,) = other.generate(inputs="x", max_new_tokens=1)
        assert "Try again in a moment" in refused["traceback"]


def test_sessions_are_bounded_and_end_with_their_connections(served, monkeypatch):
    monkeypatch.setattr(petals_sessions, "MOST_SESSIONS", 2)
    chats = [Chat(served) for _ in range(3)]
    assert [chat.ask(**OPEN)["ok"] for chat in chats] == [True, True, False]
    chats[0].socket.close()
    assert eventually(lambda: chats[2].ask(**OPEN)["ok"])
    for chat in chats[1:]:
        chat.socket.close()


def test_whoever_says_nothing_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(petals_chat, "FIRST_MESSAGE_S", 2.0)
    monkeypatch.setattr(petals_chat, "IDLE_S", 2.0)
    silent = Chat(served)
    assert "Nothing was asked" in silent.hear()["traceback"]
    with chatting(served) as chat:
        assert "Nothing was asked" in chat.hear()["traceback"]
        with pytest.raises(websocket.WebSocketConnectionClosedException):
            chat.hear()


def test_a_connection_lives_longer_than_a_head_may(served, monkeypatch):
    monkeypatch.setattr(server, "HEAD_DEADLINE_S", 1.5)
    with chatting(served) as chat:
        time.sleep(1.6)  # the case itself
        assert chat.generate(inputs="say yes", max_new_tokens=5)[-1]["outputs"] == "yes"
        time.sleep(1.6)
        assert chat.generate(inputs="\nsay no", max_new_tokens=5)[-1]["outputs"] == "no"


def test_half_an_opening_is_closed(monkeypatch):
    monkeypatch.setattr(server, "HEAD_DEADLINE_S", 0.3)
    with serving() as served, socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(b"GET /api/v2/generate HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n")
        assert client.recv(100) == b""


def test_a_message_may_be_no_larger_than_a_body():
    with serving(max_body_bytes=20_000) as served, chatting(served) as chat:
        assert chat.generate(inputs="say " + "x" * 10_000, max_new_tokens=1)[-1]["ok"]
        chat.send(type="generate", inputs="x" * 30_000, max_new_tokens=1)
        with pytest.raises(websocket.WebSocketConnectionClosedException):
            chat.hear()


def test_keys_guard_the_websocket_too():
    with serving(api_keys=("key",)) as served:
        for headers in ({}, {"Authorization": "Bearer other"}):
            with pytest.raises(websocket.WebSocketBadStatusException) as refused:
                Chat(served, **headers)
            assert refused.value.status_code == 401
        chat = Chat(served, Authorization="Bearer key")
        assert chat.ask(**OPEN) == {"ok": True}
        assert chat.generate(inputs="say yes", max_new_tokens=5)[-1]["outputs"] == "yes"
        chat.socket.close()


def test_foreign_pages_and_names_are_refused():
    with serving(cors_origins=("https://chat.example",)) as served:
        own = f"http://127.0.0.1:{served.port}"
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
            with pytest.raises(websocket.WebSocketBadStatusException) as refused:
                Chat(served, **headers)
            assert refused.value.status_code == 403, headers
        for origin in ("https://chat.example", own):
            chat = Chat(served, Origin=origin)
            assert chat.ask(**OPEN) == {"ok": True}
            chat.socket.close()


def test_there_is_one_websocket(served):
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(f"ws://127.0.0.1:{served.port}/v1/chat/completions", timeout=20)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_shutting_down_closes_connections():
    with serving() as served:
        chat = Chat(served)
        chat.ask(**OPEN)
        chat.send(type="generate", inputs="wait", max_new_tokens=1)
        assert eventually(lambda: served.engine.running == 1)
        began = time.monotonic()
    assert time.monotonic() - began < 20
    assert served.engine.running == 0 and served.engine.closed == 1
    chat.socket.close()


# -- HTTP


def generate(served: Served, **fields: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/api/v1/generate", data=fields, timeout=20)


def test_a_text_over_http(served):
    form = generate(served, model=MODEL, inputs="count 50", max_new_tokens="3", do_sample="0", temperature="")
    assert form.json() == {"ok": True, "outputs": "1 2 3"}
    query = {"model": MODEL, "inputs": "count 50", "max_length": 4, "do_sample": 1, "temperature": 0.5}
    assert httpx.post(f"{served.url}/api/v1/generate", params=query).json() == {"ok": True, "outputs": "1 2"}
    greedy, drawn = served.engine.requests
    assert (greedy.temperature, drawn.temperature) == (0, 0.5)
    umlauts = generate(served, model=MODEL, inputs="say Köln & 100%", max_new_tokens=9)
    assert (
        umlauts.json()["outputs"] == "Köln & 100%"
        and umlauts.headers["content-type"] == "application/json; charset=utf-8"
    )


def test_a_session_over_http(served):
    opened = httpx.get(f"{served.url}/api/v1/open_inference_session", params={"model": MODEL, "max_length": 30}).json()
    assert opened["ok"] and len(opened["session_id"]) == 32
    id = opened["session_id"]
    assert generate(served, session_id=id, inputs="count 50", max_new_tokens=2).json()["outputs"] == "1 2"
    assert generate(served, session_id=id, inputs="\nsay yes", max_new_tokens=2).json()["outputs"] == "yes"
    assert said(served) == "count 501 2\nsay yes"
    closed = httpx.get(f"{served.url}/api/v1/close_inference_session", params={"session_id": id})
    assert closed.json() == {"ok": True}
    gone = generate(served, session_id=id, max_new_tokens=1)
    assert gone.status_code == 404 and gone.json()["ok"] is False and "no such session" in gone.json()["traceback"]


def test_an_idle_session_ends(served, monkeypatch):
    def opened() -> httpx.Response:
        return httpx.get(f"{served.url}/api/v1/open_inference_session?model={MODEL}&max_length=30")

    monkeypatch.setattr(petals_sessions, "MOST_SESSIONS", 1)
    monkeypatch.setattr(petals_sessions, "IDLE_S", 2.0)
    id = opened().json()["session_id"]
    full = opened()
    assert full.status_code == 429 and full.json()["ok"] is False and int(full.headers["retry-after"]) > 0
    time.sleep(2.1)
    assert opened().json()["ok"]
    assert generate(served, session_id=id, inputs="x", max_new_tokens=1).status_code == 404


def test_one_answer_at_a_time_in_a_session():
    with serving(FakeEngine(pace=0.1)) as served:
        id = httpx.get(f"{served.url}/api/v1/open_inference_session?model={MODEL}&max_length=80").json()["session_id"]
        asked = {"session_id": id, "inputs": "count 30", "max_new_tokens": 30}
        first = threading.Thread(target=lambda: generate(served, **asked))
        first.start()
        assert eventually(lambda: served.engine.running == 1)
        busy = generate(served, **asked)
        assert busy.status_code == 409 and "Wait for its end" in busy.json()["traceback"]
        first.join()
        assert generate(served, session_id=id, max_new_tokens=1).status_code == 200


def test_whoever_leaves_http_ends_the_answer(served):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/api/v1/generate", data={"model": MODEL, "inputs": "wait", "max_new_tokens": 1}, timeout=3
        )
    assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"inputs": "x", "max_new_tokens": 1}, 400, "model: "),
        ({"model": "other", "inputs": "x", "max_new_tokens": 1}, 404, "There is no model"),
        ({"model": MODEL, "inputs": "x"}, 400, "max_length or max_new_tokens"),
        ({"model": MODEL, "inputs": "x", "max_new_tokens": "many"}, 400, "max_new_tokens: "),
        ({"model": MODEL, "inputs": "x", "max_new_tokens": 1, "temperature": "nan"}, 400, "temperature: "),
        ({"model": MODEL, "inputs": "x", "max_new_tokens": 1, "stop_sequence": "a"}, 400, "stop_sequence: only"),
        ({"model": MODEL, "inputs": "missing", "max_new_tokens": 1}, 503, "The swarm cannot answer now"),
        ({"model": MODEL, "inputs": "crash", "max_new_tokens": 5}, 500, "its log has the details"),
        ({"session_id": "x", "inputs": "x", "max_new_tokens": 1}, 404, "no such session"),
    ],
)
def test_what_http_refuses(served, fields, status, reason):
    answer = generate(served, **fields)
    assert answer.status_code == status and answer.json()["ok"] is False and reason in answer.json()["traceback"]


def test_bodies_that_are_no_forms(served):
    url = f"{served.url}/api/v1/generate"
    assert httpx.post(url, json={"model": MODEL}).status_code == 415
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert httpx.post(url, content=b"inputs=\xff", headers=form).status_code == 400
    assert httpx.post(url, content=b"a=1&" * 1000, headers=form).status_code == 400


@pytest.mark.parametrize("query", ["", f"model={MODEL}", f"model={MODEL}&max_length=x", f"model={MODEL}&max_length=0"])
def test_sessions_that_http_does_not_open(served, query):
    answer = httpx.get(f"{served.url}/api/v1/open_inference_session?{query}")
    assert answer.status_code == 400 and answer.json()["ok"] is False


def test_pictures_of_foreign_pages_open_no_sessions(served):
    url = f"{served.url}/api/v1/open_inference_session?model={MODEL}&max_length=5"
    assert httpx.get(url, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert httpx.get(url, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
