"""`petals-win plan`: what each PC would hold of a model, and how many PCs it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petals_win.cli.api import read_token
from petals_win.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are checked
    from petals_win.span.needs import Needs
    from petals_win.swarm.planner import Pc, Plan

_MIB, _GIB = 2**20, 2**30
_QUANTS: tuple[Literal["nf4", "int8", "none"], ...] = ("nf4", "int8", "none")
_IN_WORDS = {"nf4": "nf4", "int8": "int8", "none": "not quantized"}
_USUAL_GPUS = (8, 12, 16, 24)  # GiB


def plan(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id, folder, or .gguf file; without it, well-known models.")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Memory of a PC's GPU, e.g. 12GiB. Give it once for each PC.")
    ] = None,
    ram: Annotated[
        list[str] | None, typer.Option(help="Memory of a PC that computes on its CPU, e.g. 32GiB. Once for each PC.")
    ] = None,
    quant: Annotated[
        str, typer.Option(help="How weights are stored: nf4 (4 bits), int8, or none for the checkpoint's own.")
    ] = "none",
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell from a model's configuration alone which blocks each PC would hold, and what is missing.

    Example: petals-win plan --model meta-llama/Llama-2-70b-hf --quant nf4 --gpu 12GiB --gpu 12GiB --gpu 24GiB
    """
    from petals_win.swarm.planner import Pc, parse_size

    stored = next((each for each in _QUANTS if each == quant), None)
    if stored is None:
        raise UserError(f"There is no way {quant!r} to store weights. Use one of: {', '.join(_QUANTS)}.")
    pcs = [Pc("gpu", parse_size(size)) for size in gpu or ()] + [Pc("ram", parse_size(size)) for size in ram or ()]
    if pcs and model is None:
        raise UserError("Which model are these PCs for? Give it as --model, or leave --gpu and --ram out.")
    if model is None or not pcs:
        _show_smallest(model, read_token(token_file), as_json)
    else:
        _show_plan(model, pcs, stored, read_token(token_file), as_json)


def _needs(model: str, token: str | None) -> dict[str, Needs]:
    """What a model takes, by quantization. Of a well-known one nothing is fetched, of any other its configuration."""
    from petals_win.span.needs import needs_of
    from petals_win.swarm.known_models import find_known_model

    known = find_known_model(model)
    if known is not None:
        config = known.config()
        dtype = config.dtype
    else:
        from petals_win.span.source import open_model

        source = open_model(model, token=token)
        config, dtype = source.config, source.dtype
    return {quant: needs_of(config, dtype, quant) for quant in _QUANTS}  # pyright: ignore[reportArgumentType]


def _show_plan(model: str, pcs: Sequence[Pc], quant: str, token: str | None, as_json: bool) -> None:
    from petals_win.swarm.planner import make_plan

    needs = _needs(model, token)[quant]
    made = make_plan(needs, pcs)
    if as_json:
        typer.echo(json.dumps({"model": model, "quant": quant, **_facts(needs), **_plan_facts(made)}))
        return
    typer.echo(
        f"{model}, {_IN_WORDS[quant]}: {needs.num_blocks} blocks, the largest of {max(needs.block_bytes) / _MIB:,.0f} MiB, and "
        f"{needs.cache_bytes / _MIB:,.0f} MiB for the caches of each ({needs.cache_tokens:,} tokens of all sessions together).\n"
    )
    for number, share in enumerate(made.shares, 1):
        holds = f"blocks {share.start}:{share.end}" if share.end > share.start else _why_none(share.pc, made, needs)
        typer.echo(f"PC {number}  {share.pc.kind.upper()} {share.pc.total_bytes / _GIB:>5g} GiB  {holds}")
    typer.echo(f"\n{_verdict(needs, made, pcs)}")
    typer.echo(
        f"The PC that asks holds another {needs.outside_bytes / _MIB:,.0f} MiB (embeddings and head) in its RAM.\n"
        "A tenth of what is free stays free; the system and torch are taken to have 1 GiB of a GPU, 4 GiB of a PC's RAM."
    )


def _why_none(pc: Pc, made: Plan, needs: Needs) -> str:
    from petals_win.span.needs import blocks_that_fit

    if blocks_that_fit(pc.free_bytes, needs):
        return "no block is left for it"
    return f"too small for a block, which takes {needs.served_block_bytes / _MIB:,.0f} MiB with its caches"


def _verdict(needs: Needs, made: Plan, pcs: Sequence[Pc]) -> str:
    from petals_win.swarm.planner import pcs_needed

    missing = made.missing
    if not missing:
        return "All blocks have a place."
    happens = f"The blocks {missing.start}:{missing.stop} ({len(missing)} of {needs.num_blocks}) have no place: nothing can be answered yet."
    largest = max(pcs, key=lambda pc: pc.free_bytes)
    more = pcs_needed(needs, largest, len(missing))
    if more is None:
        return f"{happens} Use GPUs with more memory, --quant nf4, or a smaller model."
    pc_text = f"PC with {largest.total_bytes / _GIB:g} GiB" + (
        " of GPU memory" if largest.kind == "gpu" else " of RAM"
    )
    return f"{happens} Add {more} more {pc_text}." if more == 1 else f"{happens} Add {more} more, each a {pc_text}."


def _show_smallest(model: str | None, token: str | None, as_json: bool) -> None:
    """How many PCs with equal GPUs a model takes."""
    from petals_win.swarm.known_models import KNOWN_MODELS
    from petals_win.swarm.planner import Pc, pcs_needed

    names = [model] if model else [known.name for known in KNOWN_MODELS]
    rows = []
    for name in names:
        for quant, needs in _needs(name, token).items():
            counts = {f"{size}GiB": pcs_needed(needs, Pc("gpu", size * _GIB)) for size in _USUAL_GPUS}
            rows.append({"model": name, "quant": quant, **_facts(needs), "pcs": counts})
    if as_json:
        typer.echo(json.dumps({"smallest": rows}))
        return
    wide = max(len(name) for name in names)
    typer.echo(f"{'':{wide}}  {'':13}  {'weights':>9}  PCs that it takes, with GPUs of")
    typer.echo(f"{'model':{wide}}  {'stored':13}  {'GiB':>9}" + "".join(f"{size:>5} GiB" for size in _USUAL_GPUS))
    for row in rows:
        weights = (sum(row["block_bytes"]) + row["outside_bytes"]) / _GIB
        counts = "".join(f"{count or '-':>9}" for count in row["pcs"].values())
        typer.echo(f"{row['model']:{wide}}  {_IN_WORDS[row['quant']]:13}  {weights:>9.1f}{counts}")


def _facts(needs: Needs) -> dict[str, object]:
    return {
        "num_blocks": needs.num_blocks,
        "block_bytes": needs.block_bytes,
        "cache_bytes_per_token": needs.cache_bytes_per_token,
        "cache_tokens": needs.cache_tokens,
        "outside_bytes": needs.outside_bytes,
    }


def _plan_facts(made: Plan) -> dict[str, object]:
    shares = [
        {"kind": share.pc.kind, "total_bytes": share.pc.total_bytes, "start": share.start, "end": share.end}
        for share in made.shares
    ]
    return {"pcs": shares, "missing": list(made.missing)}
