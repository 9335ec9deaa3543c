"""What weights, and keys and values, in fewer bits cost: how long a step takes beside 16 bits, in turns, and how much more a text surprises the model.

Run by scripts/quants, in .venv. The steps are of blocks of Llama 2 7B's shape with random weights, on the CPU; the perplexity is the
default model's on tests/data/prose.txt, against its own weights in 32 bits.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import LlamaConfig

from petals_win.client.ends import Ends
from petals_win.client.hollow import hollow_model
from petals_win.host.threads import computing
from petals_win.models.architecture import empty_model, find_blocks
from petals_win.models.default_model import default_model_path
from petals_win.models.source import ModelSource, open_model
from petals_win.span.decoder import CutDecoder
from petals_win.span.int4 import Int4Weight, has_place
from petals_win.span.kv_int8 import KvCacheDtype
from petals_win.span.layouts import lay_out_linears
from petals_win.span.linear import linear_weight
from petals_win.span.native import suits
from petals_win.span.quantized_linear import Quant, quantize_linears
from petals_win.span.span import Span
from petals_win.span.stored import StoredWeights

PROSE = Path(__file__).resolve().parents[1] / "tests" / "data" / "prose.txt"
LLAMA_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=64
)
CPU = torch.device("cpu")


def random_span(blocks: int, quant: Quant, **shape: int) -> Span:
    """Blocks of a Llama of this shape in bfloat16 with random weights, made and quantized one by one."""
    config = LlamaConfig(num_hidden_layers=blocks, **{**LLAMA_7B, **shape})
    model = empty_model(config, torch.bfloat16)
    shapes = CutDecoder(model, 0, blocks).kv_shapes(torch.bfloat16)
    for layer in find_blocks(model).layers:
        layer.to_empty(device=CPU).requires_grad_(False)
        for parameter in layer.parameters():
            parameter.uniform_(-0.02, 0.02)
        if quant != "none":
            quantize_linears(layer, quant, CPU, torch.bfloat16)
        if not suits(layer, config.model_type, torch.bfloat16, CPU):
            lay_out_linears([layer])
    span = Span(config, CutDecoder(model, 0, blocks), shapes, CPU, quant, 0)
    span.try_out()
    return span


def step_ms(spans: Sequence[Span], rows: int, rounds: int) -> list[list[float]]:
    """For each span the ms of each round's step of one token of `rows` sequences; the spans take turns."""
    sessions = [span.open(rows, rounds + 1) for span in spans]
    hidden = torch.randn(rows, 1, spans[0].row.width, dtype=torch.bfloat16)
    found: list[list[float]] = [[] for _ in spans]
    for turn in range(rounds + 1):
        for span, session, times in zip(spans, sessions, found, strict=True):
            with computing():
                began = time.perf_counter()
                span.step(session, hidden)
                if turn:  # the first one allocates
                    times.append(1000 * (time.perf_counter() - began))
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two that took turns: the middle one of the rounds' own ratios."""
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


@torch.inference_mode()
def perplexity(quant: Quant, dtype: torch.dtype) -> float:
    """The default model's on the prose, all of it in one pass, with its blocks kept so; in int4 as its file has them."""
    source = open_model(str(default_model_path()))
    model = source.whole_model(dtype)
    stored, blocks = StoredWeights(source, model, CPU), find_blocks(model)
    if quant == "int4":
        for name, tensor in source.checkpoint.tensors(model).items():
            stored.take(name, tensor)
    for index, layer in enumerate(blocks.layers):
        if quant != "none":
            below = stored.give(f"{blocks.prefix}{index}.") if quant == "int4" else None
            quantize_linears(layer, quant, CPU, dtype, below)
    return _surprise(model, source)


def _surprise(model: Any, source: ModelSource) -> float:
    ids = torch.tensor([source.tokenizer()(PROSE.read_text("utf-8"))["input_ids"]])
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())


@torch.inference_mode()
def perplexity_in_other_groups() -> float:
    """In int4, of inputs in an order by chance: as the file's groups are int4's, it shows of no other order what rounding costs."""
    source = open_model(str(default_model_path()))
    model = source.whole_model(torch.bfloat16)
    torch.manual_seed(0)
    for layer in find_blocks(model).layers:
        for module in layer.modules():
            weight = linear_weight(module)
            if weight is not None and has_place(*weight.shape):
                order = torch.randperm(weight.shape[1])
                weight[:, order] = Int4Weight(weight[:, order], CPU).dequantized().to(weight.dtype)
    return _surprise(model, source)


@torch.inference_mode()
def perplexity_by_steps(kv_cache: KvCacheDtype, dtype: torch.dtype) -> float:
    """The default model's, where sessions keep keys and values so."""
    source = open_model(str(default_model_path()))
    ends = Ends(hollow_model(source, torch.nn.Identity(), dtype=dtype))
    span = Span.load(source, 0, source.num_blocks, dtype=dtype, kv_cache=kv_cache)
    ids = torch.tensor(source.tokenizer()(PROSE.read_text("utf-8"))["input_ids"])
    hidden = ends.embed(ids, torch.arange(len(ids)))
    outputs = span.step(span.open(1, len(ids)), hidden[None])[0]
    return math.exp(torch.nn.functional.cross_entropy(ends.logits(outputs)[:-1].float(), ids[1:]).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=["speed", "perplexity"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    if asked.only != "perplexity":
        spans = [random_span(asked.blocks, quant) for quant in ("none", "int4")]
        for rows in (1, 8):
            plain, packed = step_ms(spans, rows, asked.rounds)
            figures[f"bf16_ms_{rows}"], figures[f"int4_ms_{rows}"] = min(plain), min(packed)
            figures[f"int4_over_bf16_{rows}"] = ratio(packed, plain)
    if asked.only != "speed":
        ways: list[tuple[str, Quant, torch.dtype]] = [
            ("32 bits", "none", torch.float32),
            ("16 bits", "none", torch.bfloat16),
            ("int4, 32 bits", "int4", torch.float32),
            ("int4", "int4", torch.bfloat16),
            ("nf4", "nf4", torch.bfloat16),
            ("int8", "int8", torch.bfloat16),
        ]
        figures.update({f"perplexity, {name}": perplexity(quant, dtype) for name, quant, dtype in ways})
        figures["perplexity, int4 in other groups"] = perplexity_in_other_groups()
        for name, dtype in (("32 bits", torch.float32), ("16 bits", torch.bfloat16)):
            for kept in get_args(KvCacheDtype):
                figures[f"perplexity, {name}, keys and values in {kept}"] = perplexity_by_steps(kept, dtype)
    if asked.json:
        print(json.dumps(figures))
        return
    for name, figure in figures.items():
        print(f"{name:32} {figure:10.3f}")


if __name__ == "__main__":
    main()
