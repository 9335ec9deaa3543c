"""`petals-win firewall`: let other PCs reach this one through Windows' firewall, or no longer."""

from __future__ import annotations

import typer

from petals_win.daemon.binary import find_p2pd
from petals_win.host import firewall

app = typer.Typer(help="Let other PCs reach this one through Windows' firewall.", no_args_is_help=True)


@app.command()
def add() -> None:
    """Let p2pd be reached from private networks. Needs an administrator.

    Example: petals-win firewall add
    """
    firewall.check_system()
    program = find_p2pd().path
    firewall.allow(program)
    typer.echo(f"Other PCs of your private network can reach {program} now.")
    typer.echo(
        "If Windows calls your network public, change that: Settings > Network & internet > Properties > Private network."
    )


@app.command()
def remove() -> None:
    """Take away what 'add' has added. Needs an administrator.

    Example: petals-win firewall remove
    """
    typer.echo("The rule is gone." if firewall.forget() else "There was no rule of petals-win's.")
