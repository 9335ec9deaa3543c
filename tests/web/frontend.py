"""A user's own front-end: a page of another origin, and what it gets when it asks an API from a real browser.

Nothing here knows which engine answers, so the same page can ask a fake one and a real swarm.
"""

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selenium.webdriver import Chrome

from petals_win.host.tls import Tls

# The browser fixture resolves this name to 127.0.0.1; it stands for the domain where the front-end lives.
SITE_HOST = "frontend.test"
_PAGE = Path(__file__).parent / "site.html"


@dataclass(frozen=True)
class Outcome:
    """What the page saw. status: of HTTP, None if the browser let nothing through; pieces: arrivals with new text."""

    status: int | None
    text: str
    pieces: int
    error: str | None


@contextlib.contextmanager
def site(certificate: Tls | None = None) -> Iterator[str]:
    """Serve the front-end on a port of its own, by HTTPS with a certificate; gives its origin."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = _PAGE.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.cert, certificate.key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"{'http' if certificate is None else 'https'}://{SITE_HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def ask_from(
    browser: Chrome, origin: str, *, url: str, key: str | None, model: str, question: str, space: str | None = None
) -> Outcome:
    """Open the front-end at `origin` and let it ask the API at `url`, which it says to be in the address space `space`."""
    browser.get(origin)
    arguments = {"url": url, "key": key, "model": model, "question": question, "space": space}
    return Outcome(**browser.execute_async_script("ask(arguments[0]).then(arguments[1])", arguments))
