"""`petals-win up`: the whole thing on one PC: a model, two nodes, the API and the chat page."""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
import urllib.request
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.cli import listening, logs
from petals_win.cli.api import QuantName, Threads, answer_until
from petals_win.cli.models import open_models
from petals_win.engines.registry import EngineSettings, check_engine_name
from petals_win.errors import UserError
from petals_win.host.signals import stop_event

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are checked
    from petals_win.host.console import Progress
    from petals_win.models.source import ModelSource
    from petals_win.swarm.local import LocalSwarm

_QUESTION = "What is the capital of France?"
_ANSWER = "Paris"
_CHECK_SECONDS = 120
# A proxy, of the environment or of Windows' settings, would look for 127.0.0.1 on its own PC.
# This process holds the port that it asks, so the certificate need not be looked at: it may be for another name.
_UNVERIFIED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_UNVERIFIED.check_hostname, _UNVERIFIED.verify_mode = False, ssl.CERT_NONE
_DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_UNVERIFIED)
)


@listening.with_listening
def up(
    *,
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder of safetensors, or .gguf file.")
    ] = "SmolLM2-135M-Instruct",
    listen: listening.Listening,
    engine: Annotated[
        str, typer.Option(help="What computes: 'petals' is two nodes on this PC, 'local' and 'onnx' no swarm at all.")
    ] = "petals",
    quant: QuantName = None,
    threads: Threads = None,
    check: Annotated[
        bool,
        typer.Option("--check", help=f"Ask {_QUESTION!r} through the API and end: 0 if the answer says {_ANSWER}."),
    ] = False,
) -> None:
    """Start a private swarm of two nodes on this PC, or another engine, and its API.

    Example: petals-win up
    """
    from petals_win.api.server import ApiServer
    from petals_win.host.console import Progress
    from petals_win.host.imports import importing
    from petals_win.host.logs import log_to_file
    from petals_win.host.threads import apply_thread_settings

    check_engine_name(engine)
    settings = listen.settings()
    if check:
        # A key for this question alone: of created keys only hashes are known.
        key = secrets.token_urlsafe(32)
        settings = replace(settings, port=0, api_keys=(*settings.api_keys, key) if settings.needs_key else ())
    log_to_file("up")
    stop = stop_event()
    apply_thread_settings(threads)
    result = _Check()
    # The server listens before anything slow begins: a port in use shows at once.
    with closing(ApiServer(settings)) as server, Progress() as progress, ExitStack() as held:
        progress.step(f"Opening {model}")
        with importing():
            from petals_win.models.source import open_model

        swarm = None
        if engine == "petals":
            source = open_model(model)
            # Downloads a model of one file, for which the nodes would not have the time.
            progress.detail(f"{source.name} is {source.content_id}")
            options = [
                *([] if threads is None else ["--threads", str(threads)]),
                *([] if quant is None else ["--quant", quant]),
            ]
            swarm = _two_nodes(source, model, options, progress, stop, held)
        progress.step("Loading the model's embeddings and head" if swarm else f"Loading {model}")
        common = EngineSettings("", tuple(swarm.peers)) if swarm else EngineSettings("", quant=quant)
        opened = open_models([(engine, model)], common, None, progress.note)
        name = opened.models()[0].id
        if swarm is not None:
            progress.step("Waiting for the nodes to load their blocks")
            swarm.wait_until_serving()

        def ask() -> None:
            result.ask(server.url, name, settings.api_keys[-1:])
            stop.set()

        def ready() -> None:
            if swarm is not None:
                watching = threading.Thread(
                    target=_watch, args=(swarm, stop, progress), name="watch the nodes", daemon=True
                )
                watching.start()
            progress.done(f"{name} answers at {server.url}")
            listening.tell_certificate(settings, typer.echo)
            if check:
                threading.Thread(target=ask, name="check", daemon=True).start()
            else:
                typer.echo(f"\n    Chat page: {server.url}\n    API:       {server.url}/v1\n\nCtrl+C ends everything.")

        answer_until(stop, opened, server, settings, on_ready=ready)
    if check:
        result.report()


def _two_nodes(
    source: ModelSource, model: str, options: list[str], progress: Progress, stop: threading.Event, held: ExitStack
) -> LocalSwarm:
    """Start a swarm of two nodes, which ends with `held`. They load their blocks meanwhile."""
    from petals_win.models.cuts import Cuts
    from petals_win.swarm.local import LocalSwarm

    spans = [f"{start}:{end}" for start, end in Cuts.of(source.config).halves]
    progress.step(f"Starting {'two nodes' if len(spans) > 1 else 'a node'} for the blocks {' and '.join(spans)}")

    def show(blocks: str, line: str) -> None:
        tell = progress.note if logs.is_bad_news(line) else progress.detail
        tell(f"Blocks {blocks}: {line}")

    return held.enter_context(LocalSwarm(model, spans, options=options, on_line=show, stop=stop))


def _watch(swarm: LocalSwarm, stop: threading.Event, progress: Progress) -> None:
    """Tell of each node that ends by itself."""
    told: set[str] = set()
    while not stop.wait(1):
        for failure in swarm.failures() - told:
            told.add(failure)
            progress.note(f"{failure}\nStop everything with Ctrl+C, and start it anew with 'petals-win up'.")


class _Check:
    """One question through the API, as a user would ask it."""

    answer: str | None = None
    tokens_per_s = 0.0
    error: Exception | None = None

    def ask(self, url: str, model: str, keys: tuple[str, ...]) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64}
        headers = {"Content-Type": "application/json"}
        if keys:
            headers["Authorization"] = f"Bearer {keys[0]}"
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        begin = time.perf_counter()
        try:
            with _DIRECT.open(request, timeout=_CHECK_SECONDS) as response:
                completion = json.load(response)
        except OSError as e:
            self.error = e
            return
        self.answer = completion["choices"][0]["message"]["content"]
        self.tokens_per_s = completion["usage"]["completion_tokens"] / (time.perf_counter() - begin)

    def report(self) -> None:
        if self.error is not None or self.answer is None:
            raise UserError(f"The API did not answer {_QUESTION!r}: {self.error or 'it was ended before'}.")
        typer.echo(f"{_QUESTION}\n{self.answer}\n{self.tokens_per_s:.1f} tokens/s")
        if _ANSWER not in self.answer:
            raise UserError(f"The answer does not say {_ANSWER}: the model or the swarm computes something wrong.")
