"""Many at once, and the end: the line of waiting requests, shutting down, ports, settings."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from free_ports import free_port

from api.fake_engine import MODEL, FakeEngine
from api.serving import eventually, serving
from petals_win.api import streaming
from petals_win.api.app import create_app
from petals_win.api.server import ApiServer, PortInUse
from petals_win.api.settings import Settings, read_api_keys
from petals_win.errors import UserError


def test_only_so_many_run_at_a_time_and_the_others_wait():
    with serving(FakeEngine(pace=0.02), max_running=2, max_waiting=8) as served, ThreadPoolExecutor(6) as pool:
        url = f"{served.url}/v1/chat/completions"
        answers = list(pool.map(lambda _: httpx.post(url, json=served.chat("count 5")).status_code, range(6)))
        assert answers == [200] * 6
        assert served.engine.most_running == 2


def test_a_full_line_refuses():
    with serving(max_running=1, max_waiting=1) as served:
        url = f"{served.url}/v1/chat/completions"
        waiting = []
        for _ in range(2):
            client = socket.create_connection(("127.0.0.1", served.port))
            body = b'{"model": "%s", "prompt": "wait"}' % MODEL.encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            waiting.append(client)
        assert eventually(lambda: httpx.post(url, json=served.chat("say x")).status_code == 429)
        refused = httpx.post(url, json=served.chat("say x", stream=True))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{served.url}/health").status_code == 200

        # Whoever leaves makes room, in the line as well as at the engine.
        waiting[1].close()
        waiting[0].close()
        assert eventually(lambda: httpx.post(url, json=served.chat("say x")).status_code == 200)
        assert len([r for r in served.engine.requests if r.prompt == "wait"]) <= 2
        assert eventually(lambda: served.engine.running == 0)


def test_a_client_that_stops_reading_loses_its_place(monkeypatch):
    monkeypatch.setattr(streaming, "SEND_S", 0.3)
    with serving(FakeEngine(pace=0)) as served:
        words = " ".join(["say"] + ["x" * 4000] * 900)
        body = json.dumps(served.chat(words, n=16, stream=True)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert eventually(lambda: served.engine.running == 1)
            assert eventually(lambda: served.engine.running == 0 and served.engine.cancelled == 1)
            assert served.engine.completed < 16


def test_shutting_down_ends_open_answers_and_closes_the_engine():
    with serving(FakeEngine(pace=0.01)) as served, ThreadPoolExecutor(2) as pool:
        url = f"{served.url}/v1/chat/completions"
        streamed = pool.submit(httpx.post, url, json=served.chat("count 10000", stream=True), timeout=20)
        whole = pool.submit(httpx.post, url, json=served.chat("wait"), timeout=20)
        assert eventually(lambda: served.engine.running == 2)
        served.api.stop()
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "shutting_down"
        assert '"code":"shutting_down"' in streamed.result().text
        assert eventually(lambda: served.engine.closed == 1)
        assert served.engine.cancelled == 2


def test_a_port_in_use_shows_at_once():
    with serving() as served:
        with pytest.raises(PortInUse, match=f"Port {served.port} on 127.0.0.1 is in use.*--port"):
            ApiServer(Settings(port=served.port))


def test_a_port_is_free_again_after_the_end():
    with serving(port=free_port()) as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
    with serving(port=served.port) as again:
        assert httpx.get(f"{again.url}/health").status_code == 200


def test_localhost_is_all_its_addresses():
    with serving(host="localhost") as served:
        assert served.api.url == f"http://localhost:{served.port}"
        for *_, address in socket.getaddrinfo("localhost", served.port, type=socket.SOCK_STREAM):
            with socket.create_connection(address[:2], timeout=30):
                pass


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7"])
def test_an_address_of_somebody_else(host):
    with pytest.raises(UserError, match="--host"):
        ApiServer(Settings(host=host, port=0, api_keys=("key",)))


@pytest.mark.parametrize(("host", "name"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_the_url_is_one_that_a_browser_here_can_open(host, name):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    server = ApiServer(Settings(host=host, port=0, insecure=True))
    try:
        assert server.url == f"http://{name}:{server.port}"
        socket.create_connection((name.strip("[]"), server.port), timeout=30).close()
    finally:
        server.close()


def test_stopped_before_it_served():
    engine, settings = FakeEngine(), Settings(port=0)
    server = ApiServer(settings)
    server.stop()
    asyncio.run(asyncio.wait_for(server.serve(create_app(engine, settings=settings)), 30))
    assert engine.closed == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=30)


def test_the_server_leaves_no_thread_behind():
    before = set(threading.enumerate())
    with serving() as served:
        httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi", stream=True))
    assert eventually(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "", "gaming-pc", "localhost.example"])
def test_a_host_that_others_reach_needs_a_key(host):
    with pytest.raises(UserError, match="--api-key-file.*--insecure"):
        Settings(host=host)
    Settings(host=host, api_keys=("key",))
    Settings(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_none(host):
    Settings(host=host)


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "example.org", "https://example.org/", "https://Example.org", "https://a b", "https://", ""],
)
def test_origins_are_written_as_browsers_send_them(origin):
    with pytest.raises(UserError, match="--cors-origin as https://example.org"):
        Settings(cors_origins=(origin,))


def test_good_origins_and_ports():
    Settings(cors_origins=("https://example.org", "http://localhost:3000", "http://[::1]:80", "app://obsidian.md"))
    for port in (-1, 65536):
        with pytest.raises(UserError, match="is no port"):
            Settings(port=port)


def test_settings_do_not_show_the_keys():
    assert "secret" not in repr(Settings(api_keys=("secret",)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_key_files(tmp_path, encoding):
    file = tmp_path / "keys.txt"
    file.write_text("# the living room\r\nfirst-key\r\n\r\n  second/key==  \n", encoding=encoding)
    assert read_api_keys(file) == ("first-key", "second/key==")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# only a comment\n", "holds no key"),
        (b"good\nnot good\n", "Line 2 .* is not a key"),
        ("schlüssel".encode(), "Line 1 .* is not a key"),
        (b"\xff\xff\xff", "is not a text file"),
    ],
)
def test_bad_key_files(tmp_path, content, message):
    file = tmp_path / "keys.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_api_keys(file)
    assert "not good" not in str(caught.value)


def test_a_missing_key_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_api_keys(tmp_path / "keys.txt")
