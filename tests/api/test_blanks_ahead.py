"""Blanks ahead of whole answers that take long, and answers that wait too long for their turn."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.api import blanks, generations


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(blanks, "FIRST_BLANK_S", 0.1)
    monkeypatch.setattr(blanks, "BLANK_S", 0.05)


def post(served: Served, text: str, **fields) -> httpx.Response:
    headers = {"Origin": "https://page.example"}
    return httpx.post(
        f"{served.url}/v1/chat/completions", json=served.chat(text, **fields), headers=headers, timeout=20
    )


def test_a_long_answer_begins_with_blanks():
    with serving(FakeEngine(pace=0.1), blanks_ahead=True, cors_origins=("https://page.example",)) as served:
        response = post(served, "count 6")
        assert response.headers["content-type"] == "application/json; charset=utf-8"
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "content-length" not in response.headers
        blank, _, body = response.text.partition("{")
        assert blank.strip() == "" and len(blank) >= 2
        assert json.loads("{" + body)["choices"][0]["message"]["content"] == "1 2 3 4 5 6"
        answer = served.client().chat.completions.create(model=MODEL, messages=served.chat("count 6")["messages"])
        assert answer.choices[0].message.content == "1 2 3 4 5 6"


def test_a_short_answer_and_a_stream_do_not(monkeypatch):
    monkeypatch.setattr(blanks, "FIRST_BLANK_S", 5)
    with serving(FakeEngine(pace=0.02), blanks_ahead=True, cors_origins=("https://page.example",)) as served:
        assert post(served, "say yes").text.startswith("{")
        monkeypatch.setattr(blanks, "FIRST_BLANK_S", 0.1)
        assert post(served, "count 20", stream=True).text.startswith("data: ")
        refused = post(served, "Hi", model="other")
        assert refused.status_code == 404 and refused.text.startswith("{")
        assert httpx.get(f"{served.url}/v1/models").text.startswith("{")


@pytest.mark.parametrize(("text", "code"), [("break", "swarm_unavailable"), ("crash", None)])
def test_what_goes_wrong_after_blanks_is_in_the_body(text, code):
    with serving(FakeEngine(pace=0.2), blanks_ahead=True, cors_origins=("https://page.example",)) as served:
        response = post(served, text)
        assert response.status_code == 200 and response.text.startswith(" ")
        assert response.json()["error"]["code"] == code


def test_a_defect_of_ours_after_blanks(monkeypatch, caplog):
    monkeypatch.setattr("petals_win.api.shapes.ChatShape.whole", lambda *_: 1 / 0)
    with serving(FakeEngine(pace=0.2), blanks_ahead=True, cors_origins=("https://page.example",)) as served:
        response = post(served, "count 3")
        assert response.status_code == 200 and response.text.startswith(" ")
        assert "inside petals-win" in response.json()["error"]["message"] and "ZeroDivisionError" in caplog.text


def test_who_leaves_meanwhile_cancels_the_answer():
    with serving(blanks_ahead=True) as served:
        with pytest.raises(httpx.ReadTimeout):
            with httpx.stream(
                "POST", f"{served.url}/v1/chat/completions", json=served.chat("wait"), timeout=3
            ) as response:
                # Blanks keep the connection alive: whoever reads them does not run into its timeout.
                assert next(response.iter_raw()).strip() == b""
                raise httpx.ReadTimeout("enough")
        assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)


def test_without_the_option_nothing_is_sent_ahead():
    with serving(FakeEngine(pace=0.1)) as served:
        assert httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("count 4")).text.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_too_long_for_a_turn_is_told_so(monkeypatch, stream):
    monkeypatch.setattr(generations, "TURN_S", 0.3)
    with serving(max_running=1) as served:
        body = json.dumps(served.chat("wait")).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as first:
            first.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert eventually(lambda: served.engine.running == 1)
            response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("say x", stream=stream))
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout" and response.json()["error"]["type"] == "server_error"
        assert eventually(lambda: served.engine.running == 0)
        assert httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("say x")).status_code == 200
