"""`petals-win plan`: what each PC would hold of a model, and how many PCs it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petals_win.cli.api import read_token
from petals_win.errors import UserError
from petals_win.host.imports import importing

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are checked
    from petals_win.span.needs import Needs
    from petals_win.swarm.planner import Pc, Plan

_MIB, _GIB = 2**20, 2**30
_QUANTS: tuple[Literal["int4", "nf4", "int8", "none"], ...] = ("nf4", "int4", "int8", "none")
_IN_WORDS = {"nf4": "nf4", "int4": "int4", "int8": "int8", "none": "not quantized"}
_DEFAULT_QUANTS = {"gpu": "nf4", "ram": "none"}  # of a model that is not stored in four bits
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
        str | None,
        typer.Option(
            help="How PCs keep weights: nf4 or int4 (4 bits), int8 or none; default, as of 'serve': int4 for a model that is stored in four "
            "bits; of others nf4 on GPUs, else none."
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell from a model's configuration alone which blocks each PC would hold, and what is missing.

    Example: petals-win plan --model meta-llama/Llama-2-70b-hf --gpu 12GiB --gpu 12GiB --gpu 24GiB
    """
    with importing():
        from petals_win.span.quantized_linear import parse_quant
    from petals_win.swarm.planner import Pc, parse_size

    if quant is not None:
        parse_quant(quant)
    pcs = [Pc("gpu", parse_size(size)) for size in gpu or ()] + [Pc("ram", parse_size(size)) for size in ram or ()]
    if pcs and model is None:
        raise UserError("Which model are these PCs for? Give it as --model, or leave --gpu and --ram out.")
    if model is None or not pcs:
        _show_smallest(model, read_token(token_file), as_json)
    else:
        _show_plan(model, pcs, quant, read_token(token_file), as_json)


def _needs(model: str, token: str | None) -> tuple[dict[str, Needs], bool]:
    """What a model takes, by quantization, and whether it is stored in four bits.

    Of a well-known one nothing is fetched, of any other its configuration.
    """
    from petals_win.span.needs import needs_of
    from petals_win.swarm.known_models import find_known_model

    known = find_known_model(model)
    if known is not None:
        config, in_four_bits = known.config(), frozenset[str]()
        dtype = config.dtype
    else:
        from petals_win.models.source import open_model

        source = open_model(model, token=token)
        config, dtype, in_four_bits = source.config, source.dtype, source.in_four_bits
    needs: dict[str, Needs] = {
        quant: needs_of(config, dtype, quant, in_four_bits) for quant in _QUANTS  # pyright: ignore[reportArgumentType]
    }
    return needs, bool(in_four_bits)


def _show_plan(model: str, pcs: Sequence[Pc], quant: str | None, token: str | None, as_json: bool) -> None:
    from petals_win.swarm.planner import make_plan

    by_quant, in_four_bits = _needs(model, token)
    kept = [quant or ("int4" if in_four_bits else _DEFAULT_QUANTS[pc.kind]) for pc in pcs]  # by each PC
    made = make_plan([(pc, by_quant[way]) for pc, way in zip(pcs, kept, strict=True)])
    any_needs = by_quant["none"]
    if as_json:
        shares = [
            {
                "kind": share.pc.kind,
                "total_bytes": share.pc.total_bytes,
                "quant": way,
                "start": share.start,
                "end": share.end,
            }
            for share, way in zip(made.shares, kept, strict=True)
        ]
        sizes = {way: _facts(by_quant[way]) for way in _QUANTS if way in kept}
        facts = {"model": model, "num_blocks": any_needs.num_blocks, "pcs": shares, "missing": list(made.missing)}
        typer.echo(json.dumps({**facts, "sizes": sizes}))
        return
    typer.echo(
        f"{model}: {any_needs.num_blocks} blocks. Beside its weights each takes at least {any_needs.cache_bytes / _MIB:,.0f} "
        f"MiB for caches: {any_needs.cache_tokens:,} tokens of all sessions together.\n"
    )
    for number, (share, way) in enumerate(zip(made.shares, kept, strict=True), 1):
        needs = by_quant[way]
        holds = f"blocks {share.start}:{share.end}" if share.end > share.start else _why_none(share.pc, needs)
        size = f"{max(needs.block_bytes) / _MIB:,.0f} MiB a block"
        typer.echo(
            f"PC {number}  {share.pc.kind.upper()} {share.pc.total_bytes / _GIB:>5g} GiB  {_IN_WORDS[way]:13}  {size:17}  {holds}"
        )
    typer.echo(f"\n{_verdict(made, pcs, [by_quant[way] for way in kept])}")
    typer.echo(
        f"The PC that asks holds another {any_needs.outside_bytes / _MIB:,.0f} MiB (embeddings and head) in its RAM.\n"
        "A tenth of what is free stays free; the system and torch are taken to have 1 GiB of a GPU, 4 GiB of a PC's RAM."
    )


def _why_none(pc: Pc, needs: Needs) -> str:
    from petals_win.span.needs import blocks_that_fit

    if fitting := blocks_that_fit(pc.free_bytes, needs):
        together = (
            ""
            if needs.cuts.anywhere
            else f" that it has room for: of {fitting} blocks at most, those that stay together included"
        )
        return f"no block is left for it{together}"
    return f"too small for a block, which takes {needs.served_block_bytes / _MIB:,.0f} MiB with its caches"


def _verdict(made: Plan, pcs: Sequence[Pc], needs: Sequence[Needs]) -> str:
    """Whether all blocks have a place, and if not, how many more PCs like the one that holds most would do."""
    from petals_win.span.needs import blocks_that_fit
    from petals_win.swarm.planner import pcs_needed

    missing = made.missing
    if not missing:
        return "All blocks have a place."
    happens = (
        f"The blocks {missing.start}:{missing.stop} ({len(missing)} of {needs[0].num_blocks}) have no place: "
        "nothing can be answered yet."
    )
    best, its_needs = max(zip(pcs, needs, strict=True), key=lambda pair: blocks_that_fit(pair[0].free_bytes, pair[1]))
    more = pcs_needed(its_needs, best, len(missing))
    if more is None:
        return f"{happens} Use GPUs with more memory, --quant nf4 (int4 on a CPU), or a smaller model."
    such = f"with {best.total_bytes / _GIB:g} GiB of {'GPU memory' if best.kind == 'gpu' else 'RAM'}"
    return f"{happens} Add {more} more {'PC' if more == 1 else 'PCs'} {such}{'' if more == 1 else ' each'}."


def _show_smallest(model: str | None, token: str | None, as_json: bool) -> None:
    """How many PCs with equal GPUs a model takes."""
    from petals_win.swarm.known_models import KNOWN_MODELS
    from petals_win.swarm.planner import Pc, pcs_needed

    names = [model] if model else [known.name for known in KNOWN_MODELS]
    rows = []
    for name in names:
        for quant, needs in _needs(name, token)[0].items():
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
