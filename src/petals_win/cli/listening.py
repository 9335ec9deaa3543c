"""The options of commands that start the API: where it listens and who may ask. Knows their names and help alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from petals_win.api.settings import Settings

Host = Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs a key.")]
Port = Annotated[int, typer.Option(help="Port of the API and the chat page.", min=0, max=65535)]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with one API key a line; callers send one as a Bearer token. Changes count at once."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Let others on the network in without a key.")]
CorsOrigin = Annotated[
    list[str] | None, typer.Option(help="Web origin whose pages may call this API, e.g. https://baremetalrt.ai.")
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Name under which others may ask without a key, e.g. that of a proxy: llm.example.org."),
]

Alias = Annotated[
    list[str] | None, typer.Option(help="Another name of the model, for programs that ask for a certain one: gpt-4o.")
]
AnyModel = Annotated[
    bool, typer.Option("--any-model", help="Answer by the model whatever the name that is asked for.")
]
BlanksAhead = Annotated[
    bool,
    typer.Option(
        "--blanks-ahead",
        help="Begin whole answers that take over 10 s with blanks, for a proxy that gives up on a silent server; errors after that "
        "have status 200.",
    ),
]


def settings_of(
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure: bool,
    cors_origin: list[str] | None,
    allow_host: list[str] | None,
    alias: list[str] | None = None,
    any_model: bool = False,
    blanks_ahead: bool = False,
) -> Settings:
    """What the options say. Raises UserError for what they must not say together, and for a key file that is none."""
    from petals_win.api.settings import KeyFile, Settings

    return Settings(
        host=host,
        port=port,
        key_file=KeyFile(api_key_file) if api_key_file else None,
        insecure=insecure,
        cors_origins=tuple(cors_origin or ()),
        allow_hosts=tuple(allow_host or ()),
        aliases=tuple(alias or ()),
        any_model=any_model,
        blanks_ahead=blanks_ahead,
    )
