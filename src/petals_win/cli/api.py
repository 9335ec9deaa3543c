"""`petals-win api`: the REST API and the chat page in front of a swarm."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.cli import listening
from petals_win.cli.models import KeepAlive, named_models, open_models
from petals_win.engines.registry import AUTO, EngineSettings
from petals_win.errors import UserError
from petals_win.host.children import exit_with_parent
from petals_win.host.signals import stop_event

_LAST_WORDS_S = 1.0
UPSTREAM_KEY_VARIABLE = "PETALS_WIN_UPSTREAM_KEY"

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are checked
    from petals_win.api.server import ApiServer
    from petals_win.api.settings import Settings
    from petals_win.engines.base import Engine


Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads to compute with; default: as many as other programs leave cores free.", min=1),
]

Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; default: a GPU if there is one.")]

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")]

QuantName = Annotated[
    str | None,
    typer.Option(
        help="Keep weights in fewer bits: int4 (also on a CPU), nf4, int8 or none; default: int4 for a model that is stored in four bits, "
        "and for one of more than 6 GiB on an NVIDIA GPU from compute capability 8.0 on; int8 on one of 7.5 with bitsandbytes; else none."
    ),
]

EngineName = Annotated[
    str,
    typer.Option(
        help="What computes: 'petals' is a swarm, 'local' this PC alone, 'onnx' this PC by ONNX Runtime with what 'convert' made, 'auto' "
        "what suits: the swarm that --peers names, or else this PC, if the model fits; 'openai' another server (--base-url), 'command' "
        "the program that --model describes."
    ),
]


@listening.with_listening
def api(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hugging Face id, folder of safetensors, or .gguf file; with --engine openai a model of the other server, default "
            "all; with --engine command the .toml file that describes the program. May be given several times, each with an engine of "
            "its own before it: onnx:FOLDER. Not with --workers: they have theirs."
        ),
    ] = None,
    peers: Annotated[
        list[str] | None, typer.Option(help="Address of a peer of the swarm, as 'serve' prints it.")
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(
            help="Addresses of workers that answer, as 'petals-win worker' prints them, with commas between."
        ),
    ] = None,
    workers_key_file: Annotated[
        Path | None, typer.Option(help="Copy of the workers' key file; default: where 'petals-win worker' makes it.")
    ] = None,
    listen: listening.Listening,
    engine: EngineName = AUTO,
    keep_alive: KeepAlive = None,
    device: Device = None,
    dtype: Dtype = None,
    quant: QuantName = None,
    threads: Threads = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Address of the server for --engine openai, e.g. http://127.0.0.1:11434/v1.")
    ] = None,
    upstream_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with that server's key; default: the environment variable {UPSTREAM_KEY_VARIABLE}."),
    ] = None,
) -> None:
    """Answer OpenAI-style requests: from a swarm, from workers, or from this PC alone, for which --device, --dtype and --quant are.

    Example: petals-win api --model meta-llama/Llama-2-70b-hf --peers /ip4/192.168.1.5/tcp/31330/p2p/12D3KooW…
    """
    from petals_win.api.server import ApiServer
    from petals_win.host.logs import log_to_file
    from petals_win.host.threads import apply_thread_settings

    settings = listen.settings()
    named = named_models(model or (), engine)
    if workers and (model or peers or engine != AUTO or keep_alive is not None):
        raise UserError(
            "With --workers it is the workers that compute, so --model, --engine, --peers and --keep-alive are theirs. Leave them out here."
        )
    if not (model or workers or engine == "openai"):
        raise UserError(
            "Which model? Give --model, or --workers with the addresses of PCs that answer with a model of theirs; only --engine openai "
            "offers all that there are without it."
        )
    named = named or [(engine, "")]
    if (base_url or upstream_key_file) and "openai" not in [name for name, _ in named]:
        raise UserError("--base-url and --upstream-key-file are for --engine openai. Leave them out.")
    if len(named) > 1 and listen.any_model:
        raise UserError(
            "--any-model is for one model, and there are several. Give --alias, which is of the first one, or leave it out."
        )
    exit_with_parent()
    log_to_file("api")
    stop = stop_event()

    def open_engine() -> Engine:
        if workers:
            from petals_win.jobs.opening import open_workers

            return open_workers(workers, workers_key_file)
        swarm, hub_token, key = tuple(peers or ()), read_token(token_file), _upstream_key(upstream_key_file)
        common = EngineSettings("", swarm, hub_token, device, dtype, quant, base_url, key)
        return open_models(named, common, keep_alive, lambda line: typer.echo(line, err=True))

    with closing(ApiServer(settings)) as server:  # before anything slow: a port in use shows at once
        apply_thread_settings(threads)
        listening.tell_certificate(settings, typer.echo)
        answer_until(
            stop,
            open_engine(),
            server,
            settings,
            on_ready=lambda: typer.echo(f"The API and chat page: {server.url}"),
        )


def answer_until(
    stop: threading.Event, engine: Engine, server: ApiServer, settings: Settings, on_ready: Callable[[], None]
) -> None:
    """Serve the API in front of `engine` until `stop` is set. Closes the engine.

    Raises what the engine says if it is lost: nothing can be answered any more.
    """
    from petals_win.api.app import create_app

    lost: list[UserError] = []

    def on_lost(why: UserError) -> None:
        lost.append(why)
        # A moment for whoever waits for an answer, or asks whether there may be one, to be told why.
        threading.Timer(_LAST_WORDS_S, stop.set).start()

    async def serve() -> None:
        try:
            await engine.start(on_lost)
            await server.serve(create_app(engine, settings=settings), on_ready)
        finally:
            await engine.close()

    def wait_for_stop() -> None:
        stop.wait()
        server.stop()

    threading.Thread(target=wait_for_stop, name="stop the API", daemon=True).start()
    asyncio.run(serve())
    if lost:
        raise lost[0]


def _upstream_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(UPSTREAM_KEY_VARIABLE) or None
    from petals_win.engines.openai import read_key

    return read_key(file)


def read_token(file: Path | None) -> str | None:
    """The Hugging Face token in a file; it is never given on the command line, where others could read it."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except OSError as e:
        raise UserError(f"The token file {file} cannot be read: {e.strerror}.") from e
