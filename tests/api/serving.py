"""A real server on loopback for tests: the app, uvicorn and a port of its own, in a thread."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai

from api.fake_engine import MODEL, FakeEngine
from petals_win.api.app import create_app
from petals_win.api.server import ApiServer
from petals_win.api.settings import Settings


@dataclass
class Served:
    """A server that runs: its address, its engine, and clients for it."""

    url: str
    port: int
    engine: Any
    model: str
    api: ApiServer

    def client(self, key: str = "unused") -> openai.OpenAI:
        # Nothing is encrypted here, and reading certificates takes a while.
        http = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, http_client=http)

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        """The body of a chat request."""
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **fields}


@contextlib.contextmanager
def serving(engine: Any = None, model: str = MODEL, **settings: Any) -> Iterator[Served]:
    """Serve `engine` (a FakeEngine unless given) until the block ends; fails if the server does not end by then."""
    engine = engine or FakeEngine()
    chosen = Settings(**{"port": 0, **settings})
    server = ApiServer(chosen)
    app = create_app(engine, settings=chosen)
    ready = threading.Event()

    async def serve() -> None:
        await engine.start(lambda why: None)
        await server.serve(app, ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        yield Served(f"http://127.0.0.1:{server.port}", server.port, engine, model, server)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def eventually(condition: Callable[[], bool], timeout: float = 30.0) -> bool:
    """Wait until the condition holds; False if it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
