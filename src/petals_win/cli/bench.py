"""`petals-win bench`: this PC's figures, everything side by side in one run."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def bench(
    model: Annotated[str, typer.Option(help="Model to measure with.")] = "SmolLM2-135M-Instruct",
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.", min=5)] = 7,
    tokens: Annotated[int, typer.Option(help="Tokens to generate in each round.", min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compare a two-node swarm on this PC with the same model in one process.

    Example: petals-win bench --json
    """
    from petals_win.host.threads import apply_thread_settings

    settings = apply_thread_settings(None)
    from petals_win.swarm.bench import run_bench

    report = run_bench(model, rounds=rounds, tokens=tokens, report=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "thread_settings": settings}))
        return
    mib = 2**20
    typer.echo(f"{report.model}, medians of {report.rounds} rounds of {report.tokens} tokens, taking turns\n")
    typer.echo(f"one process, {report.local_threads} threads     {report.local_tokens_per_s:8.1f} tokens/s")
    typer.echo(f"two nodes, {report.node_threads} thread each     {report.swarm_tokens_per_s:8.1f} tokens/s")
    typer.echo(
        f"ratio                       {report.ratio:8.2f}   the swarm won {report.swarm_won} of {report.rounds}"
    )
    typer.echo(f"start of the swarm          {report.start_seconds:8.1f} s")
    typer.echo(
        f"memory of a node            {report.node_bytes_over_weights:8.2f} of the weights' "
        f"{report.weights_bytes / mib:.0f} MiB, plus {report.node_overhead_bytes / mib:.0f} MiB of Python and torch"
    )
    typer.echo("threads: " + ", ".join(f"{name}={value}" for name, value in settings.items()))
