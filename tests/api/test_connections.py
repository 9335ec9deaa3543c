"""How long a connection lives: idle, with half a head, with a body that nobody reads."""

from __future__ import annotations

import http.client
import json
import socket
import time

import httpx

from api.fake_engine import MODEL
from api.serving import eventually, serving
from petals_win.api import server


def is_open(client: socket.socket) -> bool:
    """Whether the server has not closed it; what it sent is read and forgotten."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
        return False
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_a_client_may_be_idle_before_it_asks_again():
    """uvicorn's own 5 s are as long as those of clients: one in seven requests after 4.9 s met a reset."""
    with serving() as served:
        body = json.dumps(served.chat("say yes"))
        clients = [http.client.HTTPConnection("127.0.0.1", served.port, timeout=20) for _ in range(5)]

        def ask_all() -> None:
            for client in clients:
                client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                assert json.loads(client.getresponse().read())["model"] == MODEL

        ask_all()
        sockets = [client.sock for client in clients]
        time.sleep(5.5)  # the case itself: nobody says anything
        ask_all()
        assert [client.sock for client in clients] == sockets, "the same connections"
        for client in clients:
            client.close()


def test_connections_live_longer_than_those_of_clients_and_proxies():
    assert server.KEEP_ALIVE_S > 120, "Caddy keeps a connection 120 s, Go 90 s, nginx and .NET 60 s"


def test_half_sent_heads_are_closed_and_nobody_waits_for_them(monkeypatch):
    monkeypatch.setattr(server, "HEAD_DEADLINE_S", 1.5)
    with serving() as served:
        slow = []
        for number in range(300):
            slow.append(socket.create_connection(("127.0.0.1", served.port), timeout=20))
            slow[-1].sendall([b"", b"GET /health HTTP/1.1\r\nHost: local", b"P"][number % 3])
        assert httpx.get(f"{served.url}/health").status_code == 200, "while they are open"
        # A head that goes on a little at a time is no better.
        deadline = time.monotonic() + 60
        while any(is_open(client) for client in slow):
            assert time.monotonic() < deadline, "still open"
            for client in slow[1::3]:
                try:
                    client.send(b"h")
                except OSError:
                    pass  # closed, as it should be
            time.sleep(0.1)
        assert httpx.get(f"{served.url}/health").status_code == 200
        for client in slow:
            client.close()


def test_the_second_head_of_a_connection_has_a_deadline_too(monkeypatch):
    monkeypatch.setattr(server, "HEAD_DEADLINE_S", 1.5)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving() as served:
        for sent in ([whole, b"GET /he"], [whole + b"GET /he"]):
            with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
                for part in sent:
                    client.sendall(part)
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
                assert eventually(lambda client=client: not is_open(client))


def test_idle_between_requests_is_not_a_slow_head(monkeypatch):
    monkeypatch.setattr(server, "HEAD_DEADLINE_S", 1.5)
    with serving() as served, httpx.Client(base_url=served.url) as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            time.sleep(1.6)  # the case itself
        [connection] = client._transport._pool.connections  # type: ignore[attr-defined]
        assert connection.is_idle()


def test_an_answer_may_take_longer_than_a_head(monkeypatch):
    monkeypatch.setattr(server, "HEAD_DEADLINE_S", 1.5)
    with serving() as served:
        served.engine.pace = 0.1
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("count 20"), timeout=20)
        assert response.json()["usage"]["completion_tokens"] == 20


def test_a_refused_body_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(server, "BODY_DEADLINE_S", 0.5)
    with serving() as served, socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert eventually(lambda: not is_open(client))
