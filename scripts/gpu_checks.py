"""The checks of gpu-check, one function each: what the product computes on a device against what transformers does on the CPU.

Run by gpu_check.py as: gpu_checks.py DEVICE MODEL FOLDER NAME…; prints events as lines of JSON. A CPU can go through all of them as a
card does, but for its counters of memory. Knows torch, spans and swarms. Does not know deadlines. No run on a GPU is known yet.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import re
import statistics
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_models import BLOCKS, FAMILIES, LARGE, LIKE_SMOLLM2, VOCABULARY, WIDE, make_model
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
PROMPT, DECODED = 21, 10  # the prompt reaches past the windows
QUESTION = "What is the capital of France?"

# How weights are kept and computed: dtype, quantization.
STORAGES: dict[str, tuple[torch.dtype, Any]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "float16": (torch.float16, "none"),
    "nf4": (torch.bfloat16, "nf4"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
# The largest error of a logit over the largest logit. TF32, which is off, would be off by 1e-3.
EXACT = 1e-4
# In fewer bits: the error of logits (root mean square, over that of the logits) may be this many times what the same weights give on
# the CPU, and a little; but never more than the last figure. Of so many tokens, the ones with the least error: rounding leads a few to
# other experts, here and there to different ones.
COUNTED = 0.75
TIMES, AND, AT_MOST = 1.5, 0.01, {"bfloat16": 0.1, "float16": 0.05, "nf4": 0.6, "int8": 0.3, "int4": 0.6}


@dataclass(frozen=True)
class Result:
    """One line of the table. Figures are what was measured, and under "why" a reason."""

    level: Literal["ok", "failed", "skipped"]
    what: str
    figures: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """Why something cannot be checked here."""


@dataclass(frozen=True)
class Asked:
    """The device to check, a model of the user's or "", and an empty folder.

    `whole`: in all ways, and in sizes that tell of cards; else what a CPU does in a minute.
    """

    device: torch.device
    model: str
    folder: Path
    whole: bool = True

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


Check = Callable[[Asked], Iterator[Result]]


def check_device(asked: Asked) -> Iterator[Result]:
    """What there is: the card, its driver, the versions of what computes."""
    versions = {"torch": torch.__version__, **{name: _version(name) for name in ("transformers", "bitsandbytes")}}
    figures: dict[str, Any] = {"python": platform.python_version(), **versions, "system": platform.system()}
    if missing := _missing():
        figures["missing"] = ", ".join(missing)
    if not asked.is_cuda:
        yield Result("ok", "device", {"device": platform.processor() or platform.machine(), **figures})
        needs_cuda = "logits on the card", "memory on the card", "tokens/s on the card"
        for what in needs_cuda:
            yield Result("skipped", what, {"why": f"needs CUDA, and this is --device {asked.device}"})
        return
    from petals_win.host.gpu import GpuError, find_nvidia

    try:
        driver = find_nvidia()
        figures["driver"] = (
            f"{driver.version} for CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver else "no nvidia-smi"
        )
    except GpuError as e:
        figures["driver"] = str(e)
    if not torch.cuda.is_available():
        why = f"this torch finds no GPU (built for CUDA {torch.version.cuda}); --device cpu runs the half without one"
        yield Result("failed", "device", {"why": why, **figures})
        return
    free, total = torch.cuda.mem_get_info(asked.device)
    (torch.ones(64, 64, device=asked.device) @ torch.ones(64, 64, device=asked.device)).sum().item()
    figures["capability"] = ".".join(map(str, torch.cuda.get_device_capability(asked.device)))
    figures |= {"cuda": torch.version.cuda, "free MiB": free // MIB, "of": total // MIB}
    yield Result("ok", "device", {"device": torch.cuda.get_device_name(asked.device), **figures})


# Rows and columns of weights, for each way in which a card packs them, and padded; the last one for its speed.
INT4_SHAPES = ((64, 32), (100, 96), (131, 352), (192, 64), (576, 1536))
INT4_LARGE = (11008, 4096)


def check_int4(asked: Asked) -> Iterator[Result]:
    """Products and dequantized values of weights in four bits, against the groups that they were made of; how far plain ones are off; speed."""
    from petals_win.kernels.library import GROUP
    from petals_win.models.four_bits import Groups
    from petals_win.span.int4 import Int4Weight

    if why := _why_not("int4", asked.device):
        yield Result("skipped", "weights in int4", {"why": why})
        return
    chance = torch.Generator().manual_seed(3)
    values_off, products_off, rounding_off = 0.0, 0.0, 0.0
    for rows, columns in INT4_SHAPES:
        levels = torch.randint(0, 16, (rows, columns), generator=chance, dtype=torch.uint8)
        scale = 0.25 * torch.randint(
            1, 9, (rows, columns // GROUP), generator=chance
        )  # exact in 16 bits of both kinds
        weight = Int4Weight(Groups(levels, scale, -7 * scale), asked.device)
        values = (levels.float() - 7) * scale.repeat_interleave(GROUP, 1)
        values_off = max(values_off, _largest(weight.dequantized().cpu().float(), values))
        for tokens in (1, 3, 16, 65):
            inputs = torch.randn(tokens, columns, generator=chance).bfloat16()
            product = weight.multiply(inputs.to(asked.device)).cpu().float()
            expected = inputs.float() @ values.t()
            products_off = max(products_off, ((product - expected).norm() / expected.norm()).item())
        for plain in (
            torch.randn(rows, columns, generator=chance),
            torch.randn(columns, rows, generator=chance).t(),  # as experts of some models lie
        ):
            found = Int4Weight(plain, asked.device).dequantized().cpu().float()
            rounding_off = max(rounding_off, ((found - plain).norm() / plain.norm()).item())
    # Of values one step of 16 bits, of products what sums of such numbers make of it, of rounding what 16 levels for 32 normal numbers cost.
    right = values_off <= 2**-8 and products_off <= 0.01 and rounding_off <= 0.08
    figures = {
        "values off": f"{values_off:.1e}",
        "products off": f"{products_off:.1e}",
        "rounding off": f"{rounding_off:.1e}",
        "allowed": "3.9e-03, 1.0e-02, 8.0e-02",
    }
    yield Result("ok" if right else "failed", "weights in int4", figures)
    if not asked.whole:
        return
    plain = torch.randn(INT4_LARGE, generator=chance)
    weight, dense = Int4Weight(plain, asked.device), plain.to(asked.device, torch.bfloat16)
    for tokens in (1, 8, 64, 512):
        inputs = torch.randn(tokens, INT4_LARGE[1], generator=chance).to(asked.device, torch.bfloat16)
        times = {
            "us": _microseconds(asked, lambda inputs=inputs: weight.multiply(inputs)),
            "in bfloat16": _microseconds(asked, lambda inputs=inputs: inputs @ dense.t()),
        }
        yield Result("ok", f"int4 {INT4_LARGE[0]} x {INT4_LARGE[1]}, {tokens} rows", times)


def _microseconds(asked: Asked, call: Callable[[], Any]) -> float:
    times = []
    for _ in range(20):
        _synchronize(asked)
        began = time.perf_counter()
        call()
        _synchronize(asked)
        times.append(time.perf_counter() - began)
    return round(1e6 * statistics.median(times), 1)


def check_families(asked: Asked) -> Iterator[Result]:
    """Random models of six families: logits of a prefill and of steps with a cache, in all storages.

    Where the time is short in all storages for the first family, in 32 and 16 bits for the others.
    """
    for family in FAMILIES:
        storages = list(STORAGES) if asked.whole or family == "llama" else ["float32", "bfloat16"]
        folder = make_model(asked.folder / family, family)
        tokens = torch.randint(3, VOCABULARY, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(1))
        yield from _logits(asked, family, str(folder), tokens, storages)


def check_smollm2(asked: Asked) -> Iterator[Result]:
    """The default model's logits in all storages."""
    if not asked.whole and not asked.model:
        raise Skipped(
            "takes long on a CPU, where tests/e2e compares it; give its file by --model to do it all the same"
        )
    model = _smollm2(asked)
    from petals_win.models.source import open_model

    source = open_model(model)
    text = "The capital of France is Paris, and the capital of Italy is the old city of Rome, where"
    tokens = source.tokenizer()(text, return_tensors="pt")["input_ids"]
    yield from _logits(asked, "SmolLM2", model, tokens, list(STORAGES))


def check_memory(asked: Asked) -> Iterator[Result]:
    """What a span and its sessions take on the device, against what `plan` and a node's start reckon with."""
    from petals_win.models.source import open_model
    from petals_win.span.needs import needs_of
    from petals_win.span.peak import bytes_of_a_pass
    from petals_win.span.span import Span

    folder = make_model(asked.folder / "memory", "llama", **(LARGE if asked.whole else {}))
    source = open_model(str(folder))
    for storage in ("bfloat16", "nf4", "int8", "int4"):
        dtype, quant = STORAGES[storage]
        if why := _why_not(quant, asked.device):
            yield Result("skipped", f"memory, {storage}", {"why": why})
            continue
        needs = needs_of(source.config, dtype, quant, source.in_few_bits_on(asked.device.type))
        tokens = needs.cache_tokens
        before = _allocated(asked)
        _reset_peak(asked)
        span = Span.load(source, 0, source.num_blocks, dtype=dtype, device=asked.device, quant=quant)
        weights = _allocated(asked) - before if asked.is_cuda else span.weight_bytes
        session = span.open(1, tokens)
        cache = _allocated(asked) - before - weights if asked.is_cuda else span.session_bytes(1, tokens)
        wanted, wanted_cache = sum(needs.block_bytes), needs.cache_bytes * source.num_blocks
        peak = torch.cuda.max_memory_allocated(asked.device) - before if asked.is_cuda else weights + cache
        figures = {
            "weights MiB": _mib(weights),
            "planned": _mib(wanted),
            "caches MiB": _mib(cache),
            "planned caches": _mib(wanted_cache),
            "a pass MiB": _mib(bytes_of_a_pass(span, source.context_length)),
            "peak of loading MiB": _mib(peak),
        }
        right = _as_planned(weights, wanted) and _as_planned(cache, wanted_cache)
        yield Result("ok" if right else "failed", f"memory, {storage}", figures)
        session.close()
        del span, session
        _collect(asked)


def _as_planned(taken: int, planned: int) -> bool:
    """Torch rounds up what it allocates, for each tensor, to 512 bytes."""
    return 0.95 * planned <= taken <= 1.05 * planned + MIB


def check_speed(asked: Asked) -> Iterator[Result]:
    """A prompt and the tokens after it through the blocks alone, in turns with transformers: figures, not a judgement."""
    from transformers import DynamicCache

    from petals_win.models.source import open_model
    from petals_win.span.span import Span

    tokens, decoded, rounds = (1024, 64, 5) if asked.whole else (32, 4, 2)
    source = open_model(str(make_model(asked.folder / "speed", "llama", **(WIDE if asked.whole else {}))))
    spans: dict[str, Span] = {}
    for storage in ("bfloat16", "nf4", "int4") if asked.whole else ("bfloat16", "int4"):
        dtype, quant = STORAGES[storage]
        if why := _why_not(quant, asked.device):
            yield Result("skipped", f"blocks, {storage}", {"why": why})
            continue
        spans[storage] = Span.load(source, 0, source.num_blocks, dtype=dtype, device=asked.device, quant=quant)
    decoder: Any = source.whole_model(torch.bfloat16).to(asked.device).model
    prompt = torch.randn(1, tokens, source.config.hidden_size, generator=torch.Generator().manual_seed(4)).bfloat16()
    one = prompt[:, :1]

    def alone() -> tuple[float, float]:
        cache = DynamicCache(config=decoder.config)
        there, one_there = prompt.to(asked.device), one.to(asked.device)
        return _prefill_and_decode(
            asked,
            lambda: decoder(inputs_embeds=there, cache=cache, use_cache=True),
            lambda: decoder(inputs_embeds=one_there, cache=cache, use_cache=True),
            tokens,
            decoded,
        )

    def ours(span: Span) -> tuple[float, float]:
        session = span.open(1, tokens + decoded)
        try:
            return _prefill_and_decode(
                asked, lambda: span.step(session, prompt), lambda: span.step(session, one), tokens, decoded
            )
        finally:
            session.close()

    ways: dict[str, Callable[[], tuple[float, float]]] = {"alone": alone}
    ways |= {storage: lambda span=span: ours(span) for storage, span in spans.items()}
    with torch.inference_mode():
        for way in ways.values():
            way()  # warm up
        found = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    medians = {name: [statistics.median(each[name][kind] for each in found) for kind in (0, 1)] for name in ways}
    for storage in spans:
        figures: dict[str, Any] = {}
        for kind, what in enumerate(("prefill", "decode")):
            mine, theirs = medians[storage][kind], medians["alone"][kind]
            figures |= {
                what: round(mine, 1),
                f"{what} alone": round(theirs, 1),
                f"{what} ratio": round(mine / theirs, 2),
            }
        yield Result("ok", f"tokens/s of {BLOCKS} blocks, {storage}", figures)
    yield Result(
        "skipped", "CUDA graphs", {"why": "there are none in petals-win: each operation is launched by itself"}
    )


def _prefill_and_decode(
    asked: Asked, prefill: Callable[[], Any], decode: Callable[[], Any], tokens: int, decoded: int
) -> tuple[float, float]:
    """Tokens/s of either."""

    def timed(call: Callable[[], Any], times: int) -> float:
        _synchronize(asked)
        began = time.perf_counter()
        for _ in range(times):
            call()
        _synchronize(asked)
        return time.perf_counter() - began

    return tokens / timed(prefill, 1), decoded / timed(decode, decoded)


def check_full(asked: Asked) -> Iterator[Result]:
    """No memory is left in the middle: a node says that it is full, nothing stays, and the next question is answered as before."""
    import asyncio

    from petals_win.errors import NodeFull
    from petals_win.models.source import open_model
    from petals_win.node.budget import CacheBudget
    from petals_win.node.service import BlockService
    from petals_win.span.compute import ComputeThread
    from petals_win.span.span import CHUNK_TOKENS, Span

    source = open_model(str(make_model(asked.folder / "full", "llama", **(LARGE if asked.whole else {}))))
    span = Span.load(source, 0, BLOCKS, device=asked.device)
    hidden = torch.randn(1, CHUNK_TOKENS, span.row.width, generator=torch.Generator().manual_seed(5))
    compute = ComputeThread()
    compute.start()
    service = BlockService(
        span, compute, CacheBudget(2**30), context_length=2 * CHUNK_TOKENS, request_tokens=CHUNK_TOKENS
    )

    async def ask(tokens: int) -> torch.Tensor:
        session = service.open(0, BLOCKS, batch_size=1, max_length=2 * CHUNK_TOKENS)
        try:
            first = await session.step(hidden[:, :PROMPT])
            return first if tokens == PROMPT else await session.step(hidden[:, :tokens])
        finally:
            await session.close()

    async def check() -> Result:
        await ask(CHUNK_TOKENS)  # libraries take memory of their own when they are first called
        expected = await ask(PROMPT)
        before, said = _allocated(asked), list[str]()
        tries = {
            "a session": lambda: ask(CHUNK_TOKENS),
            "a pass without one": lambda: service.forward(hidden, 0, BLOCKS),
        }
        for what, attempt in tries.items():
            with _no_room(asked, span):
                try:
                    await attempt()
                    said.append(f"{what} was computed all the same")
                except NodeFull as e:
                    said.append(e.sentence)
                except Exception as e:
                    said.append(f"{type(e).__name__} for {what}: {str(e)[:100]}")
        full = all("no memory left" in sentence for sentence in said)
        same = _largest(await ask(PROMPT), expected) <= EXACT
        left = _allocated(asked) - before
        figures = {"said": " / ".join(said), "next one": "the same" if same else "differs", "left MiB": _mib(left)}
        return Result("ok" if full and same and left <= 0 else "failed", "a node without memory", figures)

    try:
        yield asyncio.run(asyncio.wait_for(check(), 60))
    finally:
        compute.stop()


@contextlib.contextmanager
def _no_room(asked: Asked, span: Any) -> Iterator[None]:
    """Meanwhile nothing large can be allocated. A CPU only says so, since it has no limit that torch could set."""
    if asked.is_cuda:
        _collect(asked)
        torch.cuda.set_per_process_memory_fraction(_reserved(asked) / _total(asked), asked.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, asked.device)
        return
    alone, together = span._decoder.run, span._joint.run

    def refuse(tokens: int) -> None:
        if tokens > PROMPT:
            raise torch.OutOfMemoryError(f"{asked.device} out of memory, as it is told to say")

    def failing(hidden: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        refuse(hidden.shape[1])
        return alone(hidden, *rest, **more)

    def failing_together(parts: Any, *rest: Any) -> list[torch.Tensor]:
        refuse(max(part.shape[1] for _, part in parts))
        return together(parts, *rest)

    span._decoder.run, span._joint.run = failing, failing_together
    try:
        yield
    finally:
        span._decoder.run, span._joint.run = alone, together


def check_too_large(asked: Asked) -> Iterator[Result]:
    """A session that does not fit into the device is refused by torch, nothing of it stays, and the next one computes."""
    from petals_win.models.source import open_model
    from petals_win.span.span import Span

    span = Span.load(open_model(str(make_model(asked.folder / "room", "llama"))), 0, BLOCKS, device=asked.device)
    hidden = torch.randn(1, PROMPT, span.row.width, generator=torch.Generator().manual_seed(2))

    def compute() -> torch.Tensor:
        session = span.open(1, 2 * PROMPT)
        output = span.step(session, hidden).cpu()
        session.close()
        return output

    expected, before = compute(), _allocated(asked)
    room = 2 * torch.cuda.mem_get_info(asked.device)[1] if asked.is_cuda else 2**60
    try:
        span.open(1, room // span.cache_bytes_per_token)
    except RuntimeError as e:  # torch.OutOfMemoryError is one
        said = str(e).strip().splitlines()[0][:100]
    else:
        yield Result("failed", "a session too large", {"why": f"{room // MIB} MiB were given away"})
        return
    _collect(asked)
    same, left = _largest(compute(), expected) <= EXACT, _allocated(asked) - before
    right = same and left <= 0
    figures = {"refused": said, "next one": "the same" if same else "differs", "left MiB": _mib(left)}
    yield Result("ok" if right else "failed", "a session too large", figures)


def check_swarm(asked: Asked) -> Iterator[Result]:
    """Two nodes on one device: an answer by the API, speed, and memory on the card."""
    from petals_win.models.source import open_model
    from petals_win.span.needs import needs_of
    from petals_win.swarm.local import LocalSwarm

    model, about = _swarm_model(asked)
    source = open_model(model)
    half = source.num_blocks // 2
    spans = [f"0:{half}", f"{half}:{source.num_blocks}"]
    options = ["--device", str(asked.device), "--dtype", "float32", "--quant", "none"]
    if not asked.is_cuda:
        options += ["--threads", "1"]
    free = _free(asked)
    began = time.perf_counter()
    with LocalSwarm(model, spans, options=options, on_line=lambda *line: print(*line, file=sys.stderr)) as swarm:
        swarm.wait_until_serving()
        started = time.perf_counter() - began
        yield Result("ok", f"two nodes, {about}", {"start s": round(started, 1)})
        if asked.is_cuda:
            taken = (free - _free(asked)) / 2
            yield _memory_of_a_node(taken, needs_of(source.config, torch.float32))
        local = source.whole_model(torch.float32).to(asked.device)
        with _api(model, swarm.peers) as (url, name):
            yield _answers(asked, source, local, url, name)
            yield _speed(asked, local, model, swarm.peers)


def _memory_of_a_node(taken: float, needs: Any) -> Result:
    """Whether a node with half of the blocks has taken what a plan reckons with."""
    from petals_win.swarm.planner import TAKEN_OF_GPU

    weights = sum(needs.block_bytes) / 2
    right = weights <= taken <= weights + needs.num_blocks // 2 * needs.cache_bytes + TAKEN_OF_GPU
    figures = {"MiB": _mib(taken), "weights MiB": _mib(weights), "over them": _mib(taken - weights)}
    return Result("ok" if right else "failed", "memory of a node on the card", figures)


CHECKS: dict[str, Check] = {
    "device": check_device,
    "int4": check_int4,
    "families": check_families,
    "smollm2": check_smollm2,
    "memory": check_memory,
    "speed": check_speed,
    "too_large": check_too_large,
    "full": check_full,
    "swarm": check_swarm,
}


# -- logits


class _Blocks(nn.Module):
    """A span in the place of a model's layers: with a session while there is one, without a cache else."""

    def __init__(self, span: Any):
        super().__init__()
        self.span, self.session = span, None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        span = self.span
        stepped = span.step(self.session, hidden) if self.session else span.forward(hidden, span.start, span.end)
        return stepped.to("cpu", torch.float32)


def _logits(asked: Asked, name: str, model: str, tokens: torch.Tensor, storages: list[str]) -> Iterator[Result]:
    """Compare logits [1, tokens, vocabulary] with those of transformers in float32 on the CPU."""
    from petals_win.client.hollow import hollow_model
    from petals_win.models.source import open_model

    source = open_model(model)
    with torch.inference_mode():
        expected = source.whole_model(torch.float32)(tokens, use_cache=False).logits
    blocks = _Blocks(None)
    hollow = hollow_model(source, blocks, dtype=torch.float32)
    for storage in storages:
        if why := _why_not(STORAGES[storage][1], asked.device):
            yield Result("skipped", f"{name}, {storage}", {"why": why})
            continue
        began = time.perf_counter()
        logits, whole = _run(source, hollow, blocks, tokens, storage, asked.device)
        seconds = {"s": round(time.perf_counter() - began, 2)}
        if storage == "float32":
            error = max(_largest(logits, expected), _largest(whole, expected))
            figures = {"error": f"{error:.1e}", "allowed": f"{EXACT:.0e}", **seconds}
            yield Result("ok" if error <= EXACT else "failed", f"{name}, {storage}", figures)
            continue
        error = max(_mean(logits, expected), _mean(whole, expected))
        allowed, figures, right = AT_MOST[storage], {}, True
        if asked.whole:
            on_cpu = _run(source, hollow, blocks, tokens, storage, torch.device("cpu"))
            of_cpu = max(_mean(each, expected) for each in on_cpu)
            allowed, figures = min(allowed, TIMES * of_cpu + AND), {"on the CPU": f"{of_cpu:.1e}"}
            if storage == "int4":  # rounded alike but for the last bits of scales, so they err alike
                apart = max(_mean(*pair) for pair in zip((logits, whole), on_cpu, strict=True))
                figures["from the CPU's"], right = f"{apart:.1e}", apart <= of_cpu
        figures = {"error": f"{error:.1e}", **figures, "allowed": f"{allowed:.1e}", **seconds}
        yield Result("ok" if error <= allowed and right else "failed", f"{name}, {storage}", figures)


@torch.inference_mode()
def _run(
    source: Any, hollow: nn.Module, blocks: _Blocks, tokens: torch.Tensor, storage: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by a prefill and steps with a cache, and those of one pass without."""
    from petals_win.span.span import Span

    dtype, quant = STORAGES[storage]
    blocks.span = Span.load(source, 0, source.num_blocks, dtype=dtype, device=device, quant=quant)
    try:
        blocks.session = blocks.span.open(1, tokens.shape[1])
        pieces = tokens[:, :-DECODED], *tokens[:, -DECODED:].split(1, dim=1)
        stepped = torch.cat([hollow(piece, use_cache=False).logits for piece in pieces], dim=1)
        blocks.session = None
        return stepped, hollow(tokens, use_cache=False).logits
    finally:
        blocks.span = blocks.session = None


def _largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _mean(actual: torch.Tensor, expected: torch.Tensor) -> float:
    errors, sizes = (actual - expected).norm(dim=-1).flatten(), expected.norm(dim=-1).flatten()
    counted = errors.sort().values[: math.ceil(COUNTED * len(errors))]
    return (counted.square().mean().sqrt() / sizes.square().mean().sqrt()).item()


# -- models


def _smollm2(asked: Asked) -> str:
    """Raises Skipped where it is not: nothing is fetched here."""
    from petals_win.models.default_model import default_model_path

    path = Path(asked.model) if asked.model else default_model_path()
    if not path.exists():
        raise Skipped(f"SmolLM2 is not in petals-win's cache ({path}); give its file by --model")
    return str(path)


def _swarm_model(asked: Asked) -> tuple[str, str]:
    if not asked.is_cuda:
        return str(make_model(asked.folder / "swarm", "llama")), "a small random model"
    try:
        return _smollm2(asked), "SmolLM2"
    except Skipped:
        return str(make_model(asked.folder / "swarm", "llama", **LIKE_SMOLLM2)), "a random model of SmolLM2's shapes"


# -- the swarm


@contextlib.contextmanager
def _api(model: str, peers: list[str]) -> Iterator[tuple[str, str]]:
    """The API in front of the swarm, on a thread of its own: its address, and the model's name there."""
    import asyncio

    from petals_win.api.app import create_app
    from petals_win.api.server import ApiServer
    from petals_win.api.settings import Settings
    from petals_win.engines.petals import PetalsEngine
    from petals_win.engines.text import TextEngine

    settings = Settings(port=0)
    server = ApiServer(settings)
    engine = TextEngine(PetalsEngine.connect(model, peers))
    ready = threading.Event()

    async def serve() -> None:
        await engine.start(lambda why: print(why, file=sys.stderr))
        await server.serve(create_app(engine, settings=settings), ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="API", daemon=True)
    thread.start()
    try:
        if not ready.wait(60):
            raise TimeoutError("the API did not get ready within 60 s")
        yield server.url, engine.models()[0].id
    finally:
        server.stop()
        thread.join(20)


def _answers(asked: Asked, source: Any, local: Any, url: str, name: str) -> Result:
    """The same question to the swarm, by HTTP, and to transformers in this process, on the same device."""
    import urllib.request

    messages, limit = [{"role": "user", "content": QUESTION}], 24
    body = json.dumps({"model": name, "messages": messages, "max_tokens": limit, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with loopback
    with direct.open(request, timeout=60) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    tokenizer = source.tokenizer()
    prompt = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    expected_ids = _greedy(local, prompt.to(asked.device), max_new_tokens=limit)[0, prompt.shape[1] :]
    expected = tokenizer.decode(expected_ids.tolist(), skip_special_tokens=True)
    same = answer.strip() == expected.strip()
    figures = {"text": "that of one process" if same else f"{answer!r} is not {expected!r}", "words": answer[:60]}
    return Result("ok" if same else "failed", "an answer by the API", figures)


def _speed(asked: Asked, local: Any, model: str, peers: list[str]) -> Result:
    """Tokens/s, in turns; a figure, not a judgement."""
    tokens, rounds = (64, 5) if asked.is_cuda else (8, 2)
    prompt = torch.arange(5, 5 + PROMPT).unsqueeze(0)
    with _client(model, peers) as remote:

        def timed(generate: Any, device: torch.device | str) -> float:
            _synchronize(asked)
            began = time.perf_counter()
            generate(prompt.to(device), max_new_tokens=tokens, min_new_tokens=tokens)
            _synchronize(asked)
            return tokens / (time.perf_counter() - began)

        sides = [
            (lambda *a, **k: _greedy(local, *a, **k), asked.device),
            (lambda *a, **k: _greedy(remote, *a, **k), "cpu"),
        ]
        for side in sides:
            timed(*side)  # warm up
        alone, swarm = zip(*[[timed(*side) for side in sides] for _ in range(rounds)], strict=True)
    figures = {"alone": round(statistics.median(alone), 1), "swarm": round(statistics.median(swarm), 1)}
    figures["ratio"] = round(figures["swarm"] / figures["alone"], 2)
    return Result("ok", f"tokens/s, float32, {asked.device.type}", figures)


@contextlib.contextmanager
def _client(model: str, peers: list[str], **settings: Any) -> Iterator[Any]:
    from petals.utils.auto_config import AutoDistributedModelForCausalLM

    remote: Any = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=peers, show_route=False, **settings
    )
    try:
        yield remote.eval()
    finally:
        remote.blocks.sequence_manager.shutdown()
        remote.blocks.sequence_manager.dht.shutdown()


def _greedy(model: Any, prompt: torch.Tensor, **limits: int) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(prompt, do_sample=False, **limits)


# -- devices


def _synchronize(asked: Asked) -> None:
    if asked.is_cuda:
        torch.cuda.synchronize(asked.device)


def _allocated(asked: Asked) -> int:
    """Bytes that this process has on the card; 0 on a CPU, where nobody counts them."""
    _synchronize(asked)
    return torch.cuda.memory_allocated(asked.device) if asked.is_cuda else 0


def _free(asked: Asked) -> int:
    return torch.cuda.mem_get_info(asked.device)[0] if asked.is_cuda else 0


def _reserved(asked: Asked) -> int:
    return torch.cuda.memory_reserved(asked.device)


def _total(asked: Asked) -> int:
    return torch.cuda.mem_get_info(asked.device)[1]


def _reset_peak(asked: Asked) -> None:
    if asked.is_cuda:
        torch.cuda.reset_peak_memory_stats(asked.device)


def _collect(asked: Asked) -> None:
    gc.collect()
    if asked.is_cuda:
        torch.cuda.empty_cache()


def _mib(size: float) -> float:
    return round(size / MIB, 1)


def _version(package: str) -> str:
    """Of an installed package; 0 where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _missing() -> list[str]:
    """What pyproject.toml wants of other packages and is not here, in the version wanted."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = map(Requirement, project["dependencies"])
    return [str(need) for need in wanted if not need.specifier.contains(_version(need.name), prereleases=True)]


def _why_not(quant: str, device: Any) -> str:
    """Why weights cannot be kept so on `device`, or ""."""
    from petals_win.span import int4

    if quant == "int4":
        return int4.why_not(torch.device(device))
    if quant == "none":
        return ""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as e:  # it loads a library that was made for one CUDA, and fails in many ways
        return f"bitsandbytes: {(str(e).strip() or type(e).__name__).splitlines()[0]}"
    return ""


# -- running


def _carry_out(name: str, asked: Asked) -> Iterator[Result]:
    """The results of one check; what it raises is a result, too."""
    try:
        yield from CHECKS[name](asked)
    except Skipped as e:
        yield Result("skipped", name, {"why": str(e)})
    except ModuleNotFoundError as e:
        traceback.print_exc()
        ours = (e.name or "").partition(".")[0] in ("petals_win", "petals", "hivemind", "transformers", "torch")
        why = f"{e.name} is not installed"
        if ours:
            why += f": transformers {_version('transformers')} may not be the one in pyproject.toml, or external/ is not built"
        yield Result("failed" if ours else "skipped", name, {"why": why})
    except Exception as e:
        traceback.print_exc()
        yield Result("failed", name, {"why": f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0][:300]}"})


def main(device: str, model: str, folder: str, *names: str) -> int:
    if device == "cpu":
        torch.set_num_threads(1)  # small models gain nothing by more, and other programs may want them
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in names:
        _emit("begin", name=name)
        failed = False
        for result in _carry_out(name, Asked(torch.device(device), model, Path(folder), whole=device != "cpu")):
            failed = failed or result.level == "failed"
            _emit("result", level=result.level, what=result.what, figures=result.figures, check=name)
        # After an error a card may go on failing: the next check gets a process of its own.
        over = failed and device != "cpu"
        _emit("end", name=name, over=over)
        if over:
            return 1
    return 0


def _emit(event: str, **facts: Any) -> None:
    print(re.sub(r"\bNaN\b|\bInfinity\b", "null", json.dumps({"event": event, **facts})), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
