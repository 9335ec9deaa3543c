"""`petals-win patches`: upstream's sources and our changes to them. Works in a checkout only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.errors import UserError
from petals_win.upstream import build as building

if TYPE_CHECKING:
    from petals_win.upstream.patchfile import Patch

# Every other module of petals_win.upstream needs LibCST, which an installed petals-win does without: it is imported by
# the commands, after `_checkout`.

app = typer.Typer(
    help="Upstream's sources and our changes to them (in a checkout of petals-win).", no_args_is_help=True
)


def _checkout() -> building.Checkout:
    checkout = building.this_checkout()
    try:
        import libcst  # noqa: F401
    except ImportError as e:
        raise UserError("Patches need LibCST, which is not installed. Run: python -m pip install libcst") from e
    return checkout


def _patches(checkout: building.Checkout) -> tuple[Patch, ...]:
    from petals_win.upstream.patchfile import read_series

    return read_series(checkout.patches)


@app.command("list")
def list_patches(as_json: Annotated[bool, typer.Option("--json", help="All fields, for programs.")] = False) -> None:
    """Show the patches in the order in which they are applied.

    Example: petals-win patches list --json
    """
    checkout = _checkout()
    from petals_win.upstream import report

    patches = _patches(checkout)
    if as_json:
        typer.echo(json.dumps([report.as_json(patch) for patch in patches], indent=2, ensure_ascii=False))
        return
    rows = [(patch.name, patch.header.status, patch.header.subject) for patch in patches]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, status, subject in rows:
        typer.echo(f"{name:{widths[0]}}  {status:{widths[1]}}  {subject}")


@app.command()
def build(force: Annotated[bool, typer.Option("--force", help="Build even what is up to date.")] = False) -> None:
    """Fetch upstream by hash, apply all patches, and write the result to external/.

    Example: petals-win patches build
    """
    changed = building.build(_checkout(), force=force)
    typer.echo("The patched sources in external/ are new." if changed else "The patched sources are up to date.")


@app.command()
def check() -> None:
    """Check that patches, built sources and windows_patches.md agree, and that the result can be imported.

    Example: petals-win patches check
    """
    checkout = _checkout()
    from petals_win.upstream.check import check as checks

    for sentence in checks(checkout):
        typer.echo(f"ok: {sentence}")


@app.command()
def diff(name: Annotated[str | None, typer.Argument(help="Only what this patch changes.")] = None) -> None:
    """Print what the patches change, as a unified diff. It quotes upstream: look at it, do not commit it.

    Example: petals-win patches diff dht_in_a_thread
    """
    checkout = _checkout()
    from petals_win.upstream import report
    from petals_win.upstream.apply import apply_patches

    patches = _patches(checkout)
    if name is not None:
        patches = (report.select(patches, name),)
    upstream = checkout.upstream_files()
    typer.echo(report.diff(upstream, apply_patches(patches, upstream)), nl=False)


@app.command()
def show(name: Annotated[str, typer.Argument(help='As in "list"; folder and .py may be left out.')]) -> None:
    """Print one patch: why it is there, and every symbol that it changes.

    Example: petals-win patches show dht_in_a_thread
    """
    checkout = _checkout()
    from petals_win.upstream import report

    shown = report.as_json(report.select(_patches(checkout), name))
    changes = shown.pop("changes")
    for field, value in shown.items():
        typer.echo(f"{field.replace('_', ' ')}: {value}")
    for change in changes:
        kind, target, *details = (str(value) for value in change.values())
        typer.echo(f"  {kind} {target}" + (f" ({', '.join(details)})" if details else ""))


@app.command()
def table(write: Annotated[bool, typer.Option("--write", help="Put it into windows_patches.md.")] = False) -> None:
    """Print the table of all patches, or bring the one in windows_patches.md up to date.

    Example: petals-win patches table --write
    """
    checkout = _checkout()
    from petals_win.upstream import report

    patches = _patches(checkout)
    if write:
        report.write_table(checkout.register, patches)
    else:
        typer.echo(report.table(patches))


@app.command()
def digest(
    symbols: Annotated[list[str] | None, typer.Argument(help="package.module:Class.method, or a module.")] = None,
    fill: Annotated[
        list[Path] | None, typer.Option("--fill", help='Write the digests that this patch states as "?".')
    ] = None,
) -> None:
    """Print the digests of upstream's symbols, or write them into a patch.

    Example: petals-win patches digest --fill patches/hivemind/dht_in_a_thread.py
    """
    if not symbols and not fill:
        raise typer.BadParameter("name a symbol, or a patch with --fill")
    checkout = _checkout()
    from petals_win.upstream.fill import digest_of_symbol, fill_digests

    upstream = checkout.upstream_files()
    for symbol in symbols or ():
        typer.echo(f"{digest_of_symbol(symbol, upstream)}  {symbol}")
    for path in fill or ():
        for target, filled in fill_digests(path, checkout.patches, upstream):
            typer.echo(f"{filled}  {target}")
