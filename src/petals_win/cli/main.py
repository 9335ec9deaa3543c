"""The program `petals-win`. Knows its commands and how errors reach the user."""

from __future__ import annotations

from typing import Annotated

import typer

from petals_win import __version__
from petals_win.cli import (
    api,
    bench,
    convert,
    doctor,
    firewall,
    key,
    logs,
    p2pd,
    patches,
    plan,
    pull,
    serve,
    up,
    worker,
)
from petals_win.errors import UserError
from petals_win.host.children import end_children_with_this_process
from petals_win.host.console import use_utf8
from petals_win.host.disk import explain_full_disk
from petals_win.host.ending import end_now

app = typer.Typer(
    name="petals-win",
    help="Run language models too big for one PC on several PCs together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("api")(api.api)
app.command("worker")(worker.worker)
app.command("plan")(plan.plan)
app.command("pull")(pull.pull)
app.command("convert")(convert.convert)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(firewall.app, name="firewall")
app.add_typer(key.app, name="key")
app.add_typer(p2pd.app, name="p2pd")
app.add_typer(patches.app, name="patches")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"petals-win {__version__} (petals 2.2.0.post1, hivemind 1.1.12)")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logs.set_up_logging(debug)


def main() -> None:
    """Run the command line: exit code 0 for success, 1 for a failure, 2 for wrong usage."""
    use_utf8()
    end_children_with_this_process()
    end_now(_status())


def _status() -> int:
    try:
        app()
    except SystemExit as e:
        if not isinstance(e.code, int | None):
            raise
        return e.code or 0
    except UserError as e:
        if logs.debugging:
            raise
        typer.secho(f"petals-win: {e}", fg=typer.colors.RED, err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        full = explain_full_disk(e)
        if full is None or logs.debugging:
            raise
        typer.secho(f"petals-win: {full}", fg=typer.colors.RED, err=True)
        return 1
    return 0


if __name__ == "__main__":
    main()
