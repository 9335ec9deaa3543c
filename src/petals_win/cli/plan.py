"""`petals-win plan`: what each PC would hold of a model, how many PCs it takes, and about how fast they would answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.cli.api import read_token
from petals_win.errors import UserError
from petals_win.host.imports import importing

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are checked
    from petals_win.span.kv_int8 import KvCacheDtype
    from petals_win.span.needs import Needs
    from petals_win.span.quantized_linear import Quant
    from petals_win.swarm.planner import Pc, Plan
    from petals_win.swarm.speeds import Alike, Prediction

_MIB, _GIB = 2**20, 2**30
_QUANTS: tuple[Quant, ...] = ("nf4", "int4", "int8", "none")
_IN_WORDS = {"nf4": "nf4", "int4": "int4", "int8": "int8", "none": "not quantized"}
_IN_WORDS_OF_A_CPU = {"none": "16 bits", "int4": "int4"}
_OF_CPUS: tuple[Quant, ...] = ("int4", "none")  # what else there is, serve refuses there
_USUAL_GPUS, _USUAL_RAMS = (8, 12, 16, 24), (32, 64)  # GiB


def plan(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id, folder, or .gguf file; without it, well-known models.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="A PC's GPU: its memory, e.g. 12GiB, or its name, e.g. 'RTX 3060'. Give it once for each PC."
        ),
    ] = None,
    ram: Annotated[
        list[str] | None, typer.Option(help="Memory of a PC that computes on its CPU, e.g. 32GiB. Once for each PC.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="How PCs keep weights: int4 or nf4 (4 bits), int8 or none; default, as of 'serve': int4 on GPUs (of compute "
            "capability 8.0 or more) for a model of more than 6 GiB, and for one that is stored in four bits, else none. nf4 and int8 are for GPUs; what computes on its CPU "
            "keeps 16 bits beside them."
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="How PCs keep the keys and values of conversations, as of 'serve': auto or int8.")
    ] = "auto",
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell from a model's configuration alone which blocks each PC would hold, what is missing, and about how fast it answers.

    Example: petals-win plan --model meta-llama/Llama-2-70b-hf --gpu 12GiB --gpu 12GiB --gpu 24GiB
    """
    with importing():
        from petals_win.span.kv_int8 import parse_kv_cache_dtype
        from petals_win.span.quantized_linear import parse_quant
    from petals_win.swarm.planner import Pc, parse_gpu, parse_size

    asked = None if quant is None else parse_quant(quant)
    kv_cache = parse_kv_cache_dtype(kv_cache_dtype)
    if kv_cache != "auto" and model is None:
        raise UserError(
            "Not all models can keep keys and values so. Give one as --model, or leave --kv-cache-dtype out."
        )
    pcs = [parse_gpu(card) for card in gpu or ()] + [Pc("ram", parse_size(size)) for size in ram or ()]
    if pcs and model is None:
        raise UserError("Which model are these PCs for? Give it as --model, or leave --gpu and --ram out.")
    if model is None or not pcs:
        _show_smallest(model, kv_cache, read_token(token_file), as_json)
    else:
        _show_plan(model, pcs, asked, kv_cache, read_token(token_file), as_json)


def _needs(model: str, kv_cache: KvCacheDtype, token: str | None) -> tuple[Callable[[Quant, str], Needs], bool]:
    """What a model takes, by quantization and the kind of a PC, and whether it is stored in four bits.

    Of a well-known one nothing is fetched, of any other its configuration.
    """
    from petals_win.span.needs import needs_of
    from petals_win.swarm.known_models import STORED_IN, find_known_model

    known = find_known_model(model)
    if known is not None:
        config = known.config()
        return lambda quant, _kind: needs_of(config, STORED_IN, quant, kv_cache=kv_cache), False
    from petals_win.models.source import open_model

    source = open_model(model, token=token)

    def needs(quant: Quant, kind: str) -> Needs:
        in_few_bits = source.in_few_bits_on("cpu" if kind == "ram" else "cuda")
        return needs_of(source.config, source.dtype, quant, in_few_bits, kv_cache)

    return needs, bool(source.in_few_bits)


@dataclass(frozen=True)
class _Planned:
    """PCs, how each keeps weights, what the model then takes, and what follows. `plain`: what it takes in 16 bits."""

    model: str
    pcs: list[Pc]
    kept: list[Quant]
    needs: list[Needs]
    plain: Needs
    plan: Plan
    processor: dict[Quant, float]
    speed: Prediction


def _show_plan(
    model: str, pcs: list[Pc], quant: Quant | None, kv_cache: KvCacheDtype, token: str | None, as_json: bool
) -> None:
    from petals_win.span.rates import processor_rates
    from petals_win.swarm.planner import make_plan
    from petals_win.swarm.speeds import predict

    needs_on, in_four_bits = _needs(model, kv_cache, token)
    plain = needs_on("none", "ram")
    kept: list[Quant] = [_kept(pc, quant, in_four_bits, plain) for pc in pcs]
    needs = [needs_on(way, pc.kind) for way, pc in zip(kept, pcs, strict=True)]
    plan, processor = make_plan(list(zip(pcs, needs, strict=True))), processor_rates()
    speed = predict(plan, needs, kept, processor)
    made = _Planned(model, pcs, kept, needs, plain, plan, processor, speed)
    typer.echo(json.dumps(_in_json(made)) if as_json else _in_text(made))


def _in_json(made: _Planned) -> dict[str, object]:
    shares = [
        {
            "kind": share.pc.kind,
            "total_bytes": share.pc.total_bytes,
            "quant": way,
            "start": share.start,
            "end": share.end,
            "token_seconds": seconds,
        }
        for share, way, seconds in zip(made.plan.shares, made.kept, made.speed.by_pc, strict=True)
    ]
    sizes = dict(zip(made.kept, map(_facts, made.needs), strict=True))
    seconds = made.speed.token_seconds
    return {
        "model": made.model,
        "num_blocks": made.plain.num_blocks,
        "pcs": shares,
        "missing": list(made.plan.missing),
        "sizes": sizes,
        "tokens_per_s": seconds and 1 / seconds,
        "processor_bytes_per_s": made.processor,
    }


def _in_text(made: _Planned) -> str:
    plain, seconds = made.plain, made.speed.token_seconds
    lines = [
        f"{made.model}: {plain.num_blocks} blocks. Beside its weights each takes at least {plain.cache_bytes / _MIB:,.0f} "
        f"MiB for caches: {plain.cache_tokens:,} tokens of all sessions together.\n"
    ]
    of_pcs = zip(made.plan.shares, made.kept, made.needs, made.speed.by_pc, strict=True)
    for number, (share, way, needs, took) in enumerate(of_pcs, 1):
        holds = f"blocks {share.start}:{share.end}" if share.end > share.start else _why_none(share.pc, needs)
        size = f"{max(needs.block_bytes) / _MIB:,.0f} MiB a block"
        memory = f"{share.pc.kind.upper()} {share.pc.total_bytes / _GIB:>5g} GiB"
        said = "" if took is None else f", about {1000 * took:,.0f} ms a token"
        lines.append(f"PC {number}  {memory}  {_IN_WORDS[way]:13}  {size:17}  {holds}{said}")
    lines.append(f"\n{_verdict(made.plan, made.pcs, made.needs)}")
    if seconds is not None:
        lines.append(f"One answer comes at about {_speed(seconds)} tokens/s.")
    lines += [
        f"The PC that asks holds another {plain.outside_bytes / _MIB:,.0f} MiB (embeddings and head) in its RAM.",
        "A tenth of what is free stays free; the system and torch are taken to have 1 GiB of a GPU, 4 GiB of a PC's RAM.",
    ]
    if any(took is not None for took in made.speed.by_pc):
        lines.append(f"\n{_how_fast(made.pcs, made.processor)}")
    return "\n".join(lines)


def _kept(pc: Pc, quant: Quant | None, in_four_bits: bool, plain: Needs) -> Quant:
    """How a PC keeps weights if that is asked for: nf4 and int8 are for cards. `in_four_bits`: the model is stored so; `plain`: in 16."""
    from petals_win.span.choices import SMALL_BYTES

    if quant is None and not in_four_bits:
        is_small = sum(plain.block_bytes) + plain.outside_bytes <= SMALL_BYTES
        return "int4" if pc.kind == "gpu" and not is_small else "none"
    if quant is None:
        return "int4"
    return "none" if pc.kind == "ram" and quant not in _OF_CPUS else quant


def _how_fast(pcs: Sequence[Pc], processor: Mapping[Quant, float]) -> str:
    """What predicted times are made of."""
    from petals_win.swarm.cards import slowest_with
    from petals_win.swarm.speeds import CARD_BLOCK_SECONDS, HOP_SECONDS, OF_A_CARD

    cards = {card for pc in pcs if pc.kind == "gpu" and (card := pc.card or slowest_with(pc.total_bytes)) is not None}
    said = ["How fast: for each token a PC reads the weights that it computes with once."]
    measured = ", ".join(f"{rate / 1e9:.1f} GB/s in {_IN_WORDS_OF_A_CPU[way]}" for way, rate in processor.items())
    said.append(f"Measured now, on the CPU of this PC, which stands for all CPUs: {measured}.")
    if cards:
        names = ", ".join(
            f"{card.name} {card.gb_per_s}" for card in sorted(cards, key=lambda card: (card.gib, card.name))
        )
        parts = ", ".join(f"{part:g} in {_IN_WORDS_OF_A_CPU.get(way, way)}" for way, part in OF_A_CARD.items())
        said.append(
            f"Published for cards, in GB/s: {names}; without a name, the slowest with such memory. Assumed, since nothing has been "
            f"measured on a card: that they reach {parts} of it, and {1000 * CARD_BLOCK_SECONDS:g} ms more for each block."
        )
    said.append(
        f"Assumed for the way to each PC: {1000 * HOP_SECONDS:g} ms, by cable. Several answers at once share the reading."
    )
    return "\n".join(said)


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


@dataclass(frozen=True)
class _Row:
    """A model, kept in one way, on PCs that are alike: by their memory, how many it takes, if any number will do."""

    model: str
    quant: Quant
    needs: Needs
    found: dict[str, Alike | None]

    def in_json(self) -> dict[str, object]:
        counts = {memory: each and each.count for memory, each in self.found.items()}
        speeds = {memory: each and 1 / each.token_seconds for memory, each in self.found.items()}
        return {
            "model": self.model,
            "quant": self.quant,
            **_facts(self.needs),
            "pcs": counts,
            "tokens_per_s": speeds,
        }

    def in_text(self, wide: int) -> str:
        weights = (sum(self.needs.block_bytes) + self.needs.outside_bytes) / _GIB
        cells = "".join(f"{_cell(each):>12}" for each in self.found.values())
        return f"{self.model:{wide}}  {_IN_WORDS[self.quant]:13}  {weights:>7.1f}{cells}"


def _show_smallest(model: str | None, kv_cache: KvCacheDtype, token: str | None, as_json: bool) -> None:
    """How many PCs a model takes that are alike, with GPUs or without, and how fast it answers there."""
    from petals_win.span.rates import processor_rates
    from petals_win.swarm.known_models import KNOWN_MODELS
    from petals_win.swarm.planner import Pc
    from petals_win.swarm.speeds import alike

    names = [model] if model else [known.name for known in KNOWN_MODELS]
    pcs = {f"{size}GiB": Pc("gpu", size * _GIB) for size in _USUAL_GPUS}
    pcs |= {f"{size}GiB RAM": Pc("ram", size * _GIB) for size in _USUAL_RAMS}
    processor = processor_rates()
    needs_of = {name: _needs(name, kv_cache, token)[0] for name in names}
    rows = [
        _Row(
            name,
            quant,
            needs_of[name](quant, "ram"),
            {memory: alike(pc, needs_of[name](quant, pc.kind), quant, processor) for memory, pc in pcs.items()},
        )
        for name in names
        for quant in _QUANTS
    ]
    if as_json:
        typer.echo(json.dumps({"smallest": [row.in_json() for row in rows], "processor_bytes_per_s": processor}))
        return
    wide = max(len(name) for name in names)
    typer.echo(
        "How many PCs with GPUs of so much memory it takes, or with so much RAM, at how many tokens/s of one answer:\n"
    )
    heads = "".join(f"{memory:>12}" for memory in pcs)
    typer.echo(f"{'':{wide}}  {'':13}  weights\n{'model':{wide}}  {'stored':13}  {'GiB':>7}{heads}")
    for row in rows:
        typer.echo(row.in_text(wide))
    typer.echo(f"\n{_how_fast(list(pcs.values()), processor)}")


def _cell(found: Alike | None) -> str:
    return "-" if found is None else f"{found.count} at {_speed(found.token_seconds)}"


def _speed(seconds: float) -> str:
    """Tokens per second, in as many digits as are worth saying."""
    return f"{1 / seconds:.2g}" if seconds > 0.01 else f"{1 / seconds:.0f}"


def _facts(needs: Needs) -> dict[str, object]:
    return {
        "num_blocks": needs.num_blocks,
        "block_bytes": needs.block_bytes,
        "read_bytes": needs.read_bytes,
        "cache_bytes_per_token": needs.cache_bytes_per_token,
        "cache_tokens": needs.cache_tokens,
        "outside_bytes": needs.outside_bytes,
    }
