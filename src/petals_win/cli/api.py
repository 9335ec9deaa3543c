"""`petals-win api`: the REST API and the chat page in front of a swarm."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.cli import listening
from petals_win.engines.registry import AUTO, EngineSettings, check_engine_name, find_engine
from petals_win.errors import UserError
from petals_win.host.children import exit_with_parent
from petals_win.host.signals import stop_event

_LAST_WORDS_S = 1.0

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
        help="Keep weights in fewer bits: int4 (also on a CPU), nf4, int8 or none; default: nf4 on an NVIDIA GPU, else none."
    ),
]

EngineName = Annotated[
    str,
    typer.Option(
        help="What computes: 'petals' is a swarm, 'local' this PC alone, 'auto' what suits: the swarm that --peers names, or else "
        "this PC, if the model fits."
    ),
]


@listening.with_listening
def api(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face id, folder of safetensors, or .gguf file. Not with --workers: they have theirs."
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
    device: Device = None,
    dtype: Dtype = None,
    quant: QuantName = None,
    threads: Threads = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
) -> None:
    """Answer OpenAI-style requests: from a swarm, from workers, or from this PC alone, for which --device, --dtype and --quant are.

    Example: petals-win api --model meta-llama/Llama-2-70b-hf --peers /ip4/192.168.1.5/tcp/31330/p2p/12D3KooW…
    """
    from petals_win.api.server import ApiServer
    from petals_win.host.logs import log_to_file
    from petals_win.host.threads import apply_thread_settings

    settings = listen.settings()
    check_engine_name(engine)
    if (model is None) == (not workers):
        raise UserError(
            "Give either --model, or --workers with the addresses of PCs that answer with a model of theirs."
        )
    if workers and (peers or engine != AUTO):
        raise UserError(
            "With --workers it is the workers that compute, so --engine and --peers are theirs. Leave them out here."
        )
    exit_with_parent()
    log_to_file("api")
    stop = stop_event()

    def open_engine() -> Engine:
        if model is None:
            from petals_win.jobs.opening import open_workers

            return open_workers(workers or (), workers_key_file)
        wanted = EngineSettings(model, tuple(peers or ()), read_token(token_file), device, dtype, quant)
        return open_chosen_engine(engine, wanted, lambda line: typer.echo(line, err=True))

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


def open_chosen_engine(name: str, wanted: EngineSettings, tell: Callable[[str], None]) -> Engine:
    """The engine of that name, or for "auto" the one that suits; `tell` gets a line that says why. Blocks until it is loaded."""
    from petals_win.engines.choosing import choose_engine

    choice = choose_engine(name, wanted)
    if name == AUTO:
        tell(f"Engine: {choice.name}, {choice.why}.")
    return find_engine(choice.name)(wanted)


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


def read_token(file: Path | None) -> str | None:
    """The Hugging Face token in a file; it is never given on the command line, where others could read it."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except OSError as e:
        raise UserError(f"The token file {file} cannot be read: {e.strerror}.") from e
