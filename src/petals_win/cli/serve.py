"""`petals-win serve`: one node of a swarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from petals_win.cli import logs
from petals_win.cli.api import Device, Dtype, QuantName, Threads, read_token
from petals_win.errors import UserError
from petals_win.host.children import exit_with_parent, read_line

_INTERNET = (
    "With --internet this PC asks the router to open a port: whoever on the internet knows the address can join the swarm and "
    "use it. It may also pass on the traffic of members that cannot reach each other directly. "
    "On a PC elsewhere, put the router's public address in the place of this PC's into the line below.\n"
)


def serve(
    model: Annotated[str, typer.Option(help="Hugging Face id, folder of safetensors, or .gguf file.")],
    peers: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a peer of the swarm to join, - to read one from a line of standard input; none starts a new swarm."
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help="Blocks to serve, e.g. 0:15; default: as many as fit, where they are needed most."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 keeps the node on this PC.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(help="TCP port to listen on; default: the one of the last start.", min=0, max=65535)
    ] = 0,
    device: Device = None,
    dtype: Dtype = None,
    quant: QuantName = None,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="How a conversation's keys and values are kept: auto, as the blocks compute, or int8, in a half or a quarter of the "
            "memory: for longer conversations, which take longer for each token."
        ),
    ] = "auto",
    adapters: Annotated[
        list[str] | None, typer.Option(help="LoRA adapter to offer: Hugging Face id or folder.")
    ] = None,
    threads: Threads = None,
    name: Annotated[str | None, typer.Option(help="Name of this PC that others see.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    internet: Annotated[
        bool,
        typer.Option("--internet", help="Let PCs join over the internet: open the port on the router, and relay."),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Take a new address, and forget which nodes were in the swarm before."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as lines of JSON.")] = False,
) -> None:
    """Serve some of a model's blocks to a swarm.

    Example: petals-win serve --model meta-llama/Llama-2-70b-hf --blocks 0:40
    """
    from petals_win.host.awake import stay_awake
    from petals_win.host.ending import end_soon
    from petals_win.host.imports import importing
    from petals_win.host.logs import log_to_file
    from petals_win.host.memory import own_bytes
    from petals_win.host.threads import apply_thread_settings

    apply_thread_settings(threads)
    if peers == ["-"]:
        with importing():
            import petals_win.node.node  # noqa: F401  (takes seconds: meanwhile the other node may get an address)

        peers = [_peer_from_input()]
    exit_with_parent()
    if as_json:
        logs.log_for_a_parent()
    log_to_file("serve")
    with importing():
        from petals_win.node.node import Node, NodeSettings

    settings = NodeSettings(
        model=model,
        peers=tuple(peers or ()),
        blocks=blocks,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        quant=quant,
        kv_cache_dtype=kv_cache_dtype,
        adapters=tuple(adapters or ()),
        name=name,
        token=read_token(token_file),
        internet=internet,
        fresh=fresh,
    )
    with stay_awake(), Node(settings) as node:
        node.on_lost(lambda reason: end_soon(f"petals-win: {reason}"))
        if as_json:
            _emit("joined", peers=node.addresses, memory_bytes=own_bytes())
            node.run(on_serving=lambda blocks: _emit("serving", blocks=blocks))
        else:
            if internet:
                typer.echo(_INTERNET)
            typer.echo(f"This PC is in the swarm. On the next PC type:\n\n    {node.join_command}\n")
            node.run()


def _peer_from_input() -> str:
    line = read_line()
    if line is None:
        raise UserError("No address of a peer came on standard input. Give one as --peers ADDRESS.")
    return line


def _emit(event: str, **facts: object) -> None:
    typer.echo(json.dumps({"event": event, **facts}))
