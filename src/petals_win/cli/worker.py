"""`petals-win worker`: this PC answers the questions of an API elsewhere, by an engine of its own."""

from __future__ import annotations

import asyncio
import platform
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.cli.api import Device, Dtype, EngineName, QuantName, Threads, read_token
from petals_win.cli.models import KeepAlive, named_models, open_models
from petals_win.engines.registry import AUTO, EngineSettings
from petals_win.errors import UserError
from petals_win.host.children import exit_with_parent
from petals_win.host.signals import stop_event

if TYPE_CHECKING:
    from petals_win.engines.base import Engine
    from petals_win.jobs.links import Address, Door

_USUAL = "grpc://0.0.0.0:31400"


def worker(
    model: Annotated[
        list[str],
        typer.Option(
            help="Hugging Face id, folder of safetensors, or .gguf file. May be given several times, each with an engine of its own "
            "before it: onnx:FOLDER."
        ),
    ],
    listen: Annotated[
        list[str] | None,
        typer.Option(help="Where APIs reach this PC: grpc://ADDRESS:PORT or zmq://ADDRESS:PORT.", show_default=_USUAL),
    ] = None,
    engine: EngineName = AUTO,
    peers: Annotated[
        list[str] | None, typer.Option(help="Address of a peer of the swarm that computes, as 'serve' prints it.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key that workers and APIs share; default: one that is made in the data folder."
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers to compute at once; more wait in line.", min=1, max=256)] = 16,
    name: Annotated[str | None, typer.Option(help="Name of this PC that others see.")] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that answers in work are given when this ends.", min=0, max=3600)
    ] = 30.0,
    keep_alive: KeepAlive = None,
    device: Device = None,
    dtype: Dtype = None,
    quant: QuantName = None,
    threads: Threads = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
) -> None:
    """Answer the questions of an API on another PC. Several such PCs with the same model share them.

    Example: petals-win worker --model mistralai/Mistral-7B-Instruct-v0.3 --quant int4
    """
    from petals_win.host.awake import stay_awake
    from petals_win.host.logs import log_to_file
    from petals_win.host.threads import apply_thread_settings
    from petals_win.jobs.keys import default_key_file
    from petals_win.jobs.opening import open_doors

    named = named_models(model, engine)
    exit_with_parent()
    log_to_file("worker")
    stop = stop_event()
    doors = open_doors(listen or [_USUAL], key_file)  # before anything slow: what is missing shows at once
    apply_thread_settings(threads)
    common = EngineSettings("", tuple(peers or ()), read_token(token_file), device, dtype, quant)
    opened = open_models(named, common, keep_alive, lambda line: typer.echo(line, err=True))

    def tell(addresses: list[str]) -> None:
        typer.echo(
            f"This PC answers questions. On the PC with the API type:\n\n    petals-win api --workers {','.join(addresses)}\n\n"
            f"It needs the key in {key_file or default_key_file()}: copy that file there, and name the copy with --workers-key-file."
        )

    with stay_awake():
        answer_until(stop, opened, doors, name or platform.node() or "worker", slots, drain, tell)


def answer_until(
    stop: threading.Event,
    engine: Engine,
    doors: Sequence[tuple[Address, Door]],
    name: str,
    slots: int,
    drain: float,
    tell: Callable[[list[str]], None],
) -> None:
    """Offer `engine` at the doors until `stop` is set, then end what is in work. Closes the engine.

    Raises what the engine says if it is lost, and UserError if a door cannot be opened. `tell` gets the addresses.
    """
    from petals_win.jobs.opening import reached_at
    from petals_win.jobs.worker import Worker

    lost: list[UserError] = []

    def on_lost(why: UserError) -> None:
        lost.append(why)
        stop.set()

    async def serve() -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()

        def wait_for_stop() -> None:
            stop.wait()
            loop.call_soon_threadsafe(stopped.set)

        try:
            await engine.start(on_lost)
            offered = Worker(engine, name, slots=slots)
            addresses = []
            for address, door in doors:
                port = await door.open(address.host, address.port, offered.answer)
                addresses.append(reached_at(address, port, door.pin))
            tell(addresses)
            threading.Thread(target=wait_for_stop, name="stop the worker", daemon=True).start()
            await stopped.wait()
            offered.drain()
            for _, door in doors:
                await door.drain()
            if offered.load.running and not lost:
                typer.echo(
                    f"This PC takes no new questions, and ends {offered.load.running} answers in work.", err=True
                )
            await offered.drained(0 if lost else drain)
        finally:
            for _, door in doors:
                await door.close()
            await engine.close()

    asyncio.run(serve())
    if lost:
        raise lost[0]
