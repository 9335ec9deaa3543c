"""`petals-win key`: make, list and revoke keys of the API."""

from __future__ import annotations

import time
from typing import Annotated

import typer

app = typer.Typer(help="Make, list and revoke keys of the API.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Whose key it is, or what for.", show_default=False)]


@app.command()
def create(
    name: Name,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most questions in a minute.", min=1)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Most tokens in a minute, prompts and answers together.", min=1)
    ] = None,
) -> None:
    """Make a key, and show it this once: only its hash is kept. An API that runs with keys takes it a second later.

    Example: petals-win key create laptop --requests-per-minute 20
    """
    from petals_win.api.created_keys import CreatedKeys

    key = CreatedKeys().create(name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
    typer.echo(f"The key {name!r}, which is not shown again:", err=True)
    typer.echo(key)


@app.command("list")
def list_keys() -> None:
    """Show the names of the keys, when they were made, and their limits.

    Example: petals-win key list
    """
    from petals_win.api.created_keys import CreatedKeys

    keys = CreatedKeys().all()
    for key in keys:
        limits = [
            f"{limit} {what} a minute"
            for limit, what in ((key.requests_per_minute, "requests"), (key.tokens_per_minute, "tokens"))
            if limit is not None
        ]
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created))
        typer.echo(f"{key.name}  {made}  {', '.join(limits) or 'no limits'}")
    if not keys:
        typer.echo("There is no key. Make one with 'petals-win key create NAME'.", err=True)


@app.command()
def revoke(name: Name) -> None:
    """Make a key invalid: an API that runs refuses it a second later.

    Example: petals-win key revoke laptop
    """
    from petals_win.api.created_keys import CreatedKeys

    CreatedKeys().revoke(name)
    typer.echo(f"The key {name!r} is not valid any more.")
