"""`petals-win api`: the REST API and the chat page in front of a swarm."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Optional

import typer

from petals_win.errors import UserError


def api(
    model: Annotated[str, typer.Option(help="Hugging Face id, folder of safetensors, or .gguf file.")],
    peers: Annotated[Optional[list[str]], typer.Option(help="Address of a peer of the swarm, as 'serve' prints it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Optional[Path], typer.Option(help="File with one API key a line; callers send one as a Bearer token.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others on the network in without a key.")] = False,
    cors_origin: Annotated[
        Optional[list[str]], typer.Option(help="Web origin whose pages may call this API, e.g. https://baremetalrt.ai.")
    ] = None,
    token_file: Annotated[
        Optional[Path], typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
) -> None:
    """Answer OpenAI-style requests from a swarm.

    Example: petals-win api --model meta-llama/Llama-2-70b-hf --peers /ip4/192.168.1.5/tcp/31330/p2p/12D3KooW…
    """
    from petals_win.api import serve
    from petals_win.api.settings import Settings, read_api_keys
    from petals_win.host.threads import apply_thread_settings

    settings = Settings(
        host=host,
        port=port,
        api_keys=read_api_keys(api_key_file) if api_key_file else (),
        insecure=insecure,
        cors_origins=tuple(cors_origin or ()),
    )
    if not peers:
        raise UserError("Which swarm? Give --peers with the address that 'petals-win serve' prints on another PC.")
    apply_thread_settings(1)
    from petals_win.engines.petals import PetalsEngine

    token = token_file.read_text(encoding="utf-8").strip() if token_file else None
    engine = PetalsEngine.connect(model, peers, token=token)
    asyncio.run(serve(engine, settings))
