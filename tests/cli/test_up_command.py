"""What `petals-win up` asks its own API, whatever the environment says about proxies."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from petals_win.cli.up import _Check

ANSWER = {"choices": [{"message": {"content": "Paris."}}], "usage": {"completion_tokens": 2}}


@pytest.fixture
def server():
    """Starts a server that answers every POST with a status; returns its address and the paths it was asked for."""
    servers = []

    def start(status: int) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append(self.path)
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(ANSWER).encode())

            def log_message(self, format, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_check_takes_no_proxy(server, monkeypatch, name):
    api, asked_api = server(200)
    proxy, asked_proxy = server(502)
    monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    check = _Check()
    check.ask(api, "model", ())
    assert check.error is None and check.answer == "Paris."
    assert asked_api == ["/v1/chat/completions"] and not asked_proxy
