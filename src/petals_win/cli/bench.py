"""`petals-win bench`: this PC's figures, everything side by side in one run."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from petals_win.errors import UserError

app = typer.Typer(help="Measure this PC: a two-node swarm against one process; our p2pd against upstream's.")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model to measure with.")] = "SmolLM2-135M-Instruct",
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.", min=5)] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each answer.", min=1)] = 32,
    sessions: Annotated[
        str | None, typer.Option(help="How many answers at once.", show_default="1,2,8,16; with --engines 1,8,16")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a long prompt; 0 measures none.", min=0)] = 2000,
    engines: Annotated[
        bool, typer.Option("--engines", help="Compare local, onnx, petals with two nodes, and llama-server instead.")
    ] = False,
    llama_server: Annotated[
        Path | None, typer.Option(help="llama.cpp's server, for --engines; default: the one in PATH, if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compare a two-node swarm on this PC with the same model in one process.

    Example: petals-win bench --json
    """
    if context.invoked_subcommand is not None:
        return
    if llama_server is not None and not engines:
        raise typer.BadParameter("that is for --engines", param_hint="--llama-server")
    counts = _counts(sessions or ("1,8,16" if engines else "1,2,8,16"))
    from petals_win.host.threads import apply_thread_settings

    settings = apply_thread_settings(None)
    if engines:
        _bench_engines(model, rounds, tokens, counts, llama_server, as_json)
        return
    from petals_win.bench.swarm import run_bench

    report = run_bench(
        model,
        rounds=rounds,
        tokens=tokens,
        sessions=counts,
        prompt=prompt,
        report=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "thread_settings": settings}))
        return
    mib = 2**20
    typer.echo(f"{report.model}, medians of {report.rounds} rounds of {report.tokens} tokens, taking turns\n")
    for name, value in report.figures.items():
        typer.echo(f"{_WORDS.get(name) or name.replace('_', ' '):66}{value:10.3g}")
    typer.echo(
        f"the swarm won {report.swarm_won} of {report.rounds} rounds; its start took {report.start_seconds:.1f} s"
    )
    typer.echo(
        f"memory of a node: {report.node_bytes_over_weights:.2f} of the weights' "
        f"{report.weights_bytes / mib:.0f} MiB, plus {report.node_overhead_bytes / mib:.0f} MiB of Python and torch"
    )
    typer.echo(
        f"one process: {report.local_setting}; the others: {', '.join(f'{k}={v}' for k, v in settings.items())}"
    )
    typer.echo("\nAll values, by round:")
    for name, values in report.values.items():
        typer.echo(f"{name:32}" + "".join(f"{value:10.3g}" for value in values))


def _bench_engines(
    model: str, rounds: int, tokens: int, counts: list[int], llama_server: Path | None, as_json: bool
) -> None:
    from petals_win.bench.engines import run_engines_bench

    found = shutil.which("llama-server")
    report = run_engines_bench(
        model,
        rounds=rounds,
        tokens=tokens,
        sessions=counts,
        llama_server=llama_server or (Path(found) if found else None),
        report=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    typer.echo(
        f"{report.model}, tokens/s of all questions together, medians of {report.rounds} rounds of {report.tokens} tokens, taking turns\n"
    )
    typer.echo(f"{'questions':16}" + "".join(f"{count:10}" for count in report.sessions))
    for name in report.engines:
        speeds = (report.medians[f"{name}_{count}"] for count in report.sessions)
        typer.echo(f"{name.replace('_', ' '):16}" + "".join(f"{speed:10.1f}" for speed in speeds))
    for name, why in report.left_out.items():
        typer.echo(f"{name.replace('_', ' '):16}not measured: {why}")
    typer.echo("\nAll values, by round:")
    for name, values in report.values.items():
        typer.echo(f"{name:32}" + "".join(f"{value:10.1f}" for value in values))


_WORDS = {
    "local_tokens_per_s": "one process, tokens/s",
    "swarm_tokens_per_s": "two nodes and a client, tokens/s",
    "ratio": "two nodes and a client, times one process",
    "ratio_busy": "beside a busy program, times an idle PC",
    "prefill_s": "first token of a long prompt, s",
    "prefill_ratio": "its speed, times one process",
    "cached_prefill_speedup": "the same prompt again, times sooner",
    "prefill_disturbance": "time per token of 4 answers while a long prompt is read, times without",
}


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise typer.BadParameter("name numbers of answers, such as 1,2,8", param_hint="--sessions")
    return counts


@app.command("p2pd")
def bench_p2pd(
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.", min=5)] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compare p2pd with upstream's, which is taken from the pinned hivemind wheel (a checkout on Linux, x86_64).

    Example: petals-win bench p2pd
    """
    from petals_win.bench.p2pd import CONCURRENT_CALLS, run_p2pd_bench
    from petals_win.daemon.binary import find_p2pd
    from petals_win.daemon.build import this_target
    from petals_win.upstream.build import extract_daemon, this_checkout

    if this_target() != "linux/amd64":
        raise UserError("Upstream's daemon, the reference, runs on Linux on x86_64 only.")
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "p2pd"
        extract_daemon(this_checkout(), reference)
        report = run_p2pd_bench(find_p2pd().path, reference, lambda line: typer.echo(line, err=True), rounds=rounds)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    typer.echo(f"medians of {report.rounds} rounds, taking turns          ours  upstream's  ratio\n")
    ours, theirs = report.ours, report.reference
    typer.echo(
        f"call of 4 KB, ms                        {ours.latency_ms:10.3f}  {theirs.latency_ms:10.3f}  {report.latency_ratio:5.2f}"
    )
    typer.echo(
        f"stream of 64 MB, MB/s                   {ours.stream_mb_per_s:10.1f}  {theirs.stream_mb_per_s:10.1f}  {report.rate_ratio:5.2f}"
    )
    typer.echo(
        f"{CONCURRENT_CALLS} calls at once, s                 {ours.concurrent_s:10.2f}  {theirs.concurrent_s:10.2f}"
    )
