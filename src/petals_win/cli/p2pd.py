"""`petals-win p2pd`: which peer-to-peer daemon runs here, what it is, and building it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The peer-to-peer daemon: which one runs, what it is, building it.", no_args_is_help=True)


@app.command()
def locate() -> None:
    """Say which p2pd would run, and why this one.

    Example: petals-win p2pd locate
    """
    from petals_win.daemon.binary import find_p2pd

    found = find_p2pd()
    typer.echo(f"{found.path}\n{found.why}")


@app.command()
def version() -> None:
    """Say what the p2pd is that would run: its version, the commit of its source, and its Go.

    Example: petals-win p2pd version
    """
    from petals_win.daemon.binary import find_p2pd, version_of

    typer.echo(version_of(find_p2pd().path))


@app.command()
def build(
    system: Annotated[str | None, typer.Option("--os", help="windows, linux or darwin; this PC's by default.")] = None,
    machine: Annotated[str | None, typer.Option("--arch", help="amd64 or arm64; this PC's by default.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write; bin/p2pd or bin/p2pd.exe of the checkout by default.")
    ] = None,
) -> None:
    """Build p2pd from its source in this checkout, by an installed Go or one fetched for it.

    Example: petals-win p2pd build --os windows --arch amd64
    """
    from petals_win.daemon.build import build_p2pd, checkout, program_name, this_target

    here = this_target().split("/")
    target = f"{system or here[0]}/{machine or here[1]}"
    output = output or checkout() / "bin" / program_name(target)
    build_p2pd(output, target)
    typer.echo(str(output))
