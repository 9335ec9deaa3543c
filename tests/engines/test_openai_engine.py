"""The engine "openai" in front of a server that does everything wrong, and of one that is not there."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from contract import started, whole

from petals_win.engines import openai
from petals_win.engines.base import ContextTooLong, Full, GenerationRequest, ModelNotFound, Thought, Token
from petals_win.engines.openai import OpenAIEngine, open_engine, read_key
from petals_win.engines.outside import ProgramFailed, ProgramUnavailable
from petals_win.engines.registry import EngineSettings
from petals_win.errors import UserError

STREAM = {"Content-Type": "text/event-stream"}


class Hostile:
    """A server whose answer to each path is a function of its handler."""

    def __init__(self) -> None:
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: say(handler, 500, {})
        self.asked: list[tuple[str, dict, dict]] = []
        self.models: Callable[[BaseHTTPRequestHandler], None] = lambda handler: say(
            handler, 200, {"data": [{"id": "m", "max_model_len": 64}, {"id": "other"}]}
        )
        self.ended = threading.Event()
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hostile.models(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hostile.asked.append((self.path, body, dict(self.headers)))
                try:
                    hostile.answer(self)
                except OSError:
                    hostile.ended.set()

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def say(handler: BaseHTTPRequestHandler, status: int, body: object, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(json.dumps(body).encode())


def streaming(*pieces: bytes, then: Callable[[BaseHTTPRequestHandler], None] = lambda _: None):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in STREAM.items():
            handler.send_header(name, value)
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
        then(handler)

    return answer


def delta(reason: str | None = None, **fields) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": fields, "finish_reason": reason}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[Hostile]:
    hostile = Hostile()
    yield hostile
    hostile.http.shutdown()
    hostile.http.server_close()


def ask(server: Hostile, key: str | None = None, **settings):
    """A whole answer of the server."""

    async def main():
        engine = OpenAIEngine(server.url, key, "m")
        await engine.look_first()
        async with started(engine):
            messages = {"messages": ({"role": "user", "content": "hi"},)}
            request = GenerationRequest(model="m", **(messages | settings))
            events = [event async for event in engine.generate(request)]
            return events, engine.running

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_text_in_half_lines_thoughts_and_calls(server):
    call = {"index": 0, "id": "c1", "function": {"name": "clock", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a":1}'}}
    text = delta(content="Köln 😀")
    server.answer = streaming(
        b": ping\n\n", delta(reasoning_content="hm"), text[:23], text[23:], delta(tool_calls=[call]),
        delta("stop", tool_calls=[more]), b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n', DONE,
    )  # fmt: skip
    events, running = ask(server)
    assert Thought("hm") in events and Token("Köln 😀") in events and running == 0
    assert events[-2].reason == "tool_calls" and (events[-1].prompt_tokens, events[-1].completion_tokens) == (3, 4)


def test_without_counts_or_done_an_answer_that_said_its_end_is_whole(server):
    server.answer = streaming(delta(content="one"), delta("stop", content=" two"))
    events, _ = ask(server)
    assert [event.text for event in events[:-2]] == ["one", " two"]
    assert events[-1].completion_tokens == 2 and events[-1].prompt_tokens > 0


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (streaming(delta(content="one")), ProgramFailed, "broke off its answer in the middle"),
        (streaming(b"data: {oops\n\n"), ProgramFailed, "no JSON"),
        (streaming(b"data: \xf0\x9f\n\n"), ProgramFailed, "no text"),
        (streaming(b"data: []\n\n"), ProgramFailed, "no object"),
        (streaming(b'data: {"error": {"message": "out of\\nmemory"}}\n\n'), ProgramFailed, "out of memory"),
        (streaming(b"x" * 300_000), ProgramFailed, "a line of more than 100000 bytes"),
        (streaming(delta("content_filter")), UserError, "content_filter"),
        (streaming(delta(tool_calls=["x"])), ProgramFailed, "call of a tool that is none"),
        (lambda handler: say(handler, 200, {}), ProgramFailed, "does not stream"),
        (lambda handler: say(handler, 500, {"error": {"message": "boom"}}), ProgramFailed, "status 500: boom"),
        (lambda handler: say(handler, 401, {"error": {"message": "no key"}}), UserError, "--upstream-key-file"),
        (lambda handler: say(handler, 404, {"error": "no model"}), UserError, "no model"),
        (lambda handler: say(handler, 429, {"error": {"message": "slow down"}}), Full, "slow down"),
        (lambda handler: say(handler, 503, {}), Full, "no room"),
        (lambda handler: say(handler, 302, {}, Location="http://10.0.0.1/"), UserError, "another address"),
        (
            lambda handler: say(handler, 400, {"error": {"type": "exceed_context_size_error", "message": "long", "n_ctx": 64}}),
            ContextTooLong,
            "long",
        ),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told(server, monkeypatch, answer, kind, why):
    monkeypatch.setattr(openai, "_LONGEST_LINE", 100_000)
    server.answer = answer
    with pytest.raises(kind, match=why) as caught:
        ask(server)
    assert type(caught.value) is not UserError or kind is UserError


@pytest.mark.parametrize("before", [b"", delta(content="one")])
def test_silence_has_an_end(server, monkeypatch, before):
    monkeypatch.setattr(openai, "_SILENCE_S", 1.5)  # which holds for the first look, too
    monkeypatch.setattr(openai, "_EVENT_S", 3.0)
    leave = threading.Event()
    server.answer = streaming(before, then=lambda _: leave.wait(20))
    with pytest.raises(ProgramFailed, match="silent for"):
        ask(server)
    leave.set()


def test_pings_alone_do_not_keep_an_answer(server, monkeypatch):
    monkeypatch.setattr(openai, "_EVENT_S", 0.3)
    server.answer = streaming(*[b": ping\n\n"] * 3, then=lambda handler: flood(handler, b": ping\n\n"))
    with pytest.raises(ProgramFailed, match="no piece of this answer"):
        ask(server)


def flood(handler: BaseHTTPRequestHandler, piece: bytes) -> None:
    while True:
        handler.wfile.write(piece)


def test_whoever_leaves_closes_the_connection(server):
    server.answer = streaming(delta(content="one"), then=lambda handler: flood(handler, delta(content="more")))

    async def main():
        engine = OpenAIEngine(server.url, None, "m")
        await engine.look_first()
        async with started(engine):
            generation = engine.generate(GenerationRequest(model="m", prompt="hi"))
            await anext(generation)
            await generation.aclose()
            assert await asyncio.to_thread(server.ended.wait, 30), "the server was not left"

    asyncio.run(main())


def test_what_is_passed_on(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answer = streaming(delta("stop", content="x"), DONE)
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": {}}}],
    }
    ask(server, "sk-secret", messages=({"role": "user", "content": "x"}, called), tools=(tool,), tool_choice="clock",
        temperature=0.5, seed=7, presence_penalty=0.5, max_tokens=5, logprobs=2)  # fmt: skip
    path, body, headers = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "clock"}}
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"
    assert (body["temperature"], body["seed"], body["presence_penalty"], body["max_tokens"]) == (0.5, 7, 0.5, 5)
    assert (body["logprobs"], body["top_logprobs"], body["stream"]) == (True, 2, True)


def test_models(server):
    engine = open_engine(EngineSettings("", base_url=server.url))
    assert [(card.id, card.context_length) for card in engine.models()] == [("m", 64), ("other", 4096)]
    with pytest.raises(ModelNotFound, match="gpt.*m, other"):
        open_engine(EngineSettings("gpt", base_url=server.url))
    server.models = lambda handler: say(handler, 200, {"data": "x" * 10})
    with pytest.raises(ProgramFailed, match="no list of models"):
        open_engine(EngineSettings("", base_url=server.url))
    server.models = lambda handler: say(handler, 200, {"data": []})
    with pytest.raises(UserError, match="has no models"):
        open_engine(EngineSettings("", base_url=server.url))


def test_a_server_without_tokenize(server):
    server.answer = lambda handler: say(handler, 404, {})

    async def main():
        engine = OpenAIEngine(server.url, None, "m")
        await engine.look_first()
        async with started(engine):
            with pytest.raises(UserError, match="has no /tokenize"):
                await engine.tokenize(GenerationRequest(model="m", prompt="x"))
            with pytest.raises(UserError, match="^regex: "):
                from petals_win.engines.base import Constraint

                await whole(engine, GenerationRequest(model="m", prompt="x", constraint=Constraint("regex", "a")))

    asyncio.run(main())


def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(ProgramUnavailable, match=f"Nothing answers at {url}"):
            open_engine(EngineSettings("m", base_url=url))


@pytest.mark.parametrize(
    "url", ["", "ftp://x/v1", "http://", "http://x:99999/v1", "http://me:secret@x/v1", "http://x/v1?key=secret", "x"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="--base-url") as caught:
        open_engine(EngineSettings("m", base_url=url))
    assert "secret" not in str(caught.value)


def test_keys(tmp_path):
    (tmp_path / "key").write_text("sk-secret\n")
    assert read_key(tmp_path / "key") == "sk-secret"
    assert "sk-secret" not in repr(EngineSettings("m", upstream_key="sk-secret"))
    (tmp_path / "key").write_text("two words")
    for name in ("key", "none"):
        with pytest.raises(UserError, match="key file") as caught:
            read_key(tmp_path / name)
        assert "words" not in str(caught.value)
