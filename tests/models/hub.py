"""A small HTTP server that answers as the Hugging Face hub does, with models that are open, gated, or break off."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_COMMIT = "0123456789012345678901234567890123456789"
TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """`models` maps names to files. `gated` ones need the token. `failing` answers with a status instead."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    failing: dict[str, int] = field(default_factory=dict)
    break_off: dict[str, int] = field(default_factory=dict)  # file: how many bytes of it are sent, once
    damaged: set[str] = field(default_factory=set)  # files of which a byte is changed on the way
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args):
            """Nothing is printed."""

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            match = re.fullmatch(
                r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(?:resolve|revision|tree)/([^/]+)(?:/(.*))?)?", self.path
            )
            name, revision, file = match.groups() if match else ("", None, None)
            if name in hub.failing:
                self._send(hub.failing[name])
            elif name not in hub.models:
                self._send(401 if TOKEN not in self._token() else 404, {"X-Error-Code": "RepoNotFound"})
            elif name in hub.gated and TOKEN not in self._token():
                self._send(
                    401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted"}
                )
            elif revision not in ("main", _COMMIT):
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
            elif file not in hub.models[name]:
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})
            else:
                self._send_file(file, hub.models[name][file], with_body)

        def _token(self) -> str:
            return self.headers.get("Authorization", "")

        def _send(self, status: int, headers: dict[str, str] | None = None) -> None:
            body = json.dumps({"error": "said by the test's hub"}).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _send_file(self, name: str, data: bytes, with_body: bool) -> None:
            begin = 0
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                begin = int(asked[1])
            self.send_response(206 if begin else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", _COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            if with_body:
                if name in hub.damaged:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                cut = hub.break_off.pop(name, None)
                self.wfile.write(data[begin:] if cut is None else data[begin:cut])
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
