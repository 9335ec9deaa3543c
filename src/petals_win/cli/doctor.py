"""`petals-win doctor`: check this PC, one line for each finding."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from petals_win.cli import logs
from petals_win.cli.api import read_token
from petals_win.doctor.findings import Asked, Finding, run_checks

_MARKS = {"ok": "[ok]", "warning": "[!] ", "error": "[x] "}  # plain ASCII: they show on every console
_COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "error": typer.colors.RED}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Model to serve: whether it may be read and how much fits.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="Address of a peer, as 'serve' prints it: whether it answers, and its clock."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port that a node is to listen on.", min=1, max=65535)] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this PC and say what to do about each finding. Changes nothing. Exit status 1 if something is broken.

    Example: petals-win doctor --model meta-llama/Llama-2-13b-chat-hf --peers /ip4/192.168.1.5/tcp/31330/p2p/12D3KooW...
    """
    from petals_win.doctor.checks import CHECKS

    found = []
    asked = Asked(model, tuple(peers or ()), port, read_token(token_file))
    if not logs.debugging:
        logging.disable(logging.CRITICAL)  # what matters of it becomes a finding
    try:
        for check, finding in run_checks(CHECKS, asked):
            found.append({"check": check, "level": finding.level, "text": finding.text, "fix": finding.fix})
            if not as_json:
                _show(finding)
    finally:
        logging.disable(logging.NOTSET)
    broken = any(finding["level"] == "error" for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": not broken, "findings": found}))
    elif not (model and peers):
        wanted = [option for option, given in (("--model", model), ("--peers", peers)) if not given]
        typer.echo(f"Give {' and '.join(wanted)} to check {'that' if len(wanted) == 1 else 'those'}, too.")
    if broken:
        raise typer.Exit(1)


def _show(finding: Finding) -> None:
    typer.secho(_MARKS[finding.level], fg=_COLOURS[finding.level], nl=False)
    typer.echo(f" {finding.text}")
    if finding.fix:
        typer.echo(f"     -> {finding.fix}")
