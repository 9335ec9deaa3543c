"""Nodes with blocks of a 70B's true shapes: what they take, how fast and how exactly they compute, beside what the plan says.

Run by scripts/seventy-b, in .venv. A checkpoint with the 80 blocks of Llama 2 70B is made here; only those that are served are really
written, with random weights, and a small vocabulary; all other files are holes. Two nodes of two blocks each serve it, anew for each way to
keep weights: 16 bits, int4, and nf4, which nodes refuse on a CPU, so that there a span in this process stands for one. It takes 7 GB of
disk, and of RAM as much at once. What is computed is compared with transformers in 32 bits.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from petals import AutoDistributedModelForCausalLM
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from true_shapes import repeating, write_checkpoint  # noqa: E402

from petals_win.host.memory import give_back_memory, own_bytes  # noqa: E402
from petals_win.models.source import open_model  # noqa: E402
from petals_win.span.choices import choose_device  # noqa: E402
from petals_win.span.needs import needs_of  # noqa: E402
from petals_win.span.quantized_linear import Quant  # noqa: E402
from petals_win.span.rates import processor_rates  # noqa: E402
from petals_win.span.span import Span  # noqa: E402
from petals_win.swarm.known_models import find_known_model  # noqa: E402
from petals_win.swarm.local import LocalSwarm  # noqa: E402
from petals_win.swarm.speeds import Rate, share_seconds  # noqa: E402

MODEL, VOCABULARY = "meta-llama/Llama-2-70b-hf", 512
FIRST = 40  # block that is written, in the middle of the model
NODES = 2
PROMPT, DECODED = 16, 6
MIB = 2**20

# Of what the blocks add to their input: how far off it may be (root mean square). In 16 bits it is compared with transformers'.
MOST_OFF = {"int4": 0.2, "nf4": 0.25}
# Of what the plan says of the weights; what a node has before it loads is not counted.
MEMORY_OFF, MEMORY_MIB = 0.05, 32


@dataclass(frozen=True)
class Figures:
    """Of one way to keep weights; memory by node, beside what it had before loading. `predicted_s` is None where no rate is measured."""

    quant: Quant
    where: str
    planned_mib: float
    taken_mib: list[float]
    prefill_s: float
    step_s: float
    predicted_s: float | None
    off: float
    off_in_16_bits: float  # transformers' own, in bfloat16
    wrong: list[str]


def make_checkpoint(folder: Path, blocks: range) -> Path:
    known = find_known_model(MODEL)
    assert known is not None
    config = LlamaConfig(**{**known.shape, "vocab_size": VOCABULARY}, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    write_checkpoint(folder, config, blocks, repeating(seed=0))
    return folder


@torch.inference_mode()
def through_transformers(
    folder: Path, blocks: range, hidden: torch.Tensor, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Hidden states [1, tokens, hidden] behind each of transformers' blocks, of which one at a time is in memory, in 32 bits."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    hidden, tokens = hidden.to(dtype), hidden.shape[1]
    turns = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    seen = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    for block in blocks:
        with torch.device("meta"):
            layer = LlamaDecoderLayer(config, 0)
        prefix = f"model.layers.{block}."
        with safe_open(folder / f"{block}.safetensors", framework="pt") as file:
            weights = {name.removeprefix(prefix): file.get_tensor(name).to(dtype) for name in file.keys()}
        layer.load_state_dict(weights, assign=True)
        hidden = layer(hidden, attention_mask=seen, position_embeddings=turns)
        yield hidden.float()


def off(found: torch.Tensor, exact: torch.Tensor, given: torch.Tensor) -> float:
    return ((found - exact).norm() / (exact - given).norm()).item()


class Run:
    """What is the same for all ways to keep weights."""

    def __init__(self, folder: Path, blocks: range, each: int, device: torch.device):
        self.folder, self.blocks, self.each, self.device = folder, blocks, each, device
        self.spans = [range(start, start + each) for start in range(blocks.start, blocks.stop, each)]
        self.source = open_model(str(folder))
        width = self.source.config.hidden_size
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(1, PROMPT + DECODED, width, generator=generator).bfloat16()
        given = self.hidden.float()
        self._exact = list(through_transformers(folder, blocks, given, torch.float32))  # behind each block
        *_, in_16_bits = through_transformers(folder, blocks, given, torch.bfloat16)
        self.off_in_16_bits = off(in_16_bits, self._exact[-1], given)
        self.rates = processor_rates() if device.type == "cpu" else {}

    def on_nodes(self, quant: Quant, nodes: int) -> Figures:
        """On so many of the nodes, from the first one on."""
        spans = self.spans[:nodes]
        options = ["--quant", quant, "--device", str(self.device), "--dtype", "bfloat16"]
        served = [f"{span.start}:{span.stop}" for span in spans]
        with LocalSwarm(str(self.folder), served, options=options) as swarm:
            swarm.wait_until_serving()
            outputs, seconds = self._ask(swarm.peers, range(spans[0].start, spans[-1].stop))
            taken = [own_bytes(node.child.pid) - node.bytes_before_loading for node in swarm.nodes]
        return self._figures(quant, "nodes", spans, taken, outputs, seconds)

    @torch.inference_mode()
    def _ask(self, peers: list[str], served: range) -> tuple[torch.Tensor, list[float]]:
        """What the blocks make of the hidden states, and the seconds of each step."""
        settings = {"initial_peers": peers, "show_route": False, "torch_dtype": torch.bfloat16, "max_retries": 3}
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(str(self.folder), **settings)
        blocks = model.blocks[served.start : served.stop]
        try:
            with blocks.inference_session(max_length=PROMPT + DECODED) as session:
                return _steps(session.step, self.hidden)
        finally:
            blocks.sequence_manager.shutdown()
            model.blocks.sequence_manager.shutdown()
            model.blocks.sequence_manager.dht.shutdown()

    def in_this_process(self, quant: Quant) -> Figures:
        """By spans, one after the other, each of which gets what the one before it made."""
        import bitsandbytes.nn  # noqa: F401  (not a part of what the blocks take)

        hidden, seconds, taken = self.hidden, [0.0] * (1 + DECODED), list[int]()
        for blocks in self.spans:
            give_back_memory()
            before = own_bytes()
            span = Span.load(self.source, blocks.start, blocks.stop, dtype=torch.bfloat16, quant=quant)
            session = span.open(1, PROMPT + DECODED)
            hidden, took = _steps(partial(span.step, session), hidden)
            seconds = [one + other for one, other in zip(seconds, took, strict=True)]
            give_back_memory()
            taken.append(own_bytes() - before)
            session.close()
            del span, session
        return self._figures(quant, "spans in one process", self.spans, taken, hidden, seconds)

    def _figures(
        self,
        quant: Quant,
        where: str,
        spans: Sequence[range],
        taken: list[int],
        outputs: torch.Tensor,
        seconds: list[float],
    ) -> Figures:
        needs = needs_of(self.source.config, torch.bfloat16, quant)
        planned = sum(needs.block_bytes[block] for block in spans[0])
        exact = self._exact[len(spans) * self.each - 1]
        error = off(outputs.float(), exact, self.hidden.float())
        most = MOST_OFF.get(quant, 1.25 * self.off_in_16_bits)
        wrong = [] if error <= most else [f"{quant} is off by {error:.2g}, at most {most:.2g} was expected"]
        if self.device.type == "cpu":
            wrong += [
                f"{quant} took {found / MIB:,.0f} MiB, {planned / MIB:,.0f} were planned"
                for found in taken
                if abs(found - planned) > MEMORY_OFF * planned + MEMORY_MIB * MIB
            ]
        rate = self.rates.get(quant)
        predicted = None
        if rate is not None:
            predicted = sum(share_seconds(needs, span.start, span.stop, Rate(rate)) for span in spans)
        return Figures(
            quant,
            where,
            planned / MIB,
            [found / MIB for found in taken],
            seconds[0],
            statistics.median(seconds[1:]),
            predicted,
            error,
            self.off_in_16_bits,
            wrong,
        )


def _steps(step: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """What comes of a prompt and of single tokens, and the seconds of each."""
    outputs, seconds = list[torch.Tensor](), list[float]()
    for part in (hidden[:, :PROMPT], *hidden[:, PROMPT:].split(1, dim=1)):
        began = time.perf_counter()
        outputs.append(step(part))
        seconds.append(time.perf_counter() - began)
    return torch.cat(outputs, dim=1), seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/seventy-b", description=__doc__.splitlines()[0])
    parser.add_argument("--quants", nargs="+", choices=["none", "int4", "nf4"], default=["none", "int4", "nf4"])
    parser.add_argument("--short", action="store_true", help="one block on each node, and a single node in int4")
    parser.add_argument("--device", help="default: the GPU, if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    device = choose_device(asked.device)
    each = 1 if asked.short else 2
    blocks = range(FIRST, FIRST + NODES * each)
    found: list[Figures] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        run = Run(make_checkpoint(Path(place), blocks), blocks, each, device)
        for quant in asked.quants:
            refused = quant == "nf4" and device.type == "cpu"
            nodes = 1 if asked.short and quant != "none" else NODES
            found.append(run.in_this_process(quant) if refused else run.on_nodes(quant, nodes))
            print(found[-1], file=sys.stderr, flush=True)
    if asked.json:
        print(json.dumps([asdict(each) for each in found]))
    else:
        _show(found, each)
    return 1 if any(each.wrong for each in found) else 0


def _show(found: list[Figures], each_has: int) -> None:
    print(f"{NODES} nodes with {each_has} of the blocks of Llama 2 70B's shapes, of 80 in their checkpoint")
    print(f"{'':5} {'planned':>9} {'taken, MiB':>16} {'prompt':>8} {'a token':>8} {'predicted':>9} {'off':>8}")
    for each in found:
        taken = ", ".join(f"{mib:,.0f}" for mib in each.taken_mib)
        predicted = "" if each.predicted_s is None else f"{each.predicted_s:.2f} s"
        print(
            f"{each.quant:5} {each.planned_mib:9,.0f} {taken:>16} {each.prefill_s:6.2f} s {each.step_s:6.2f} s {predicted:>9} "
            f"{each.off:8.1e}  {each.where}"
        )
    print(f"off: of what the blocks add to their input; transformers in bfloat16: {found[0].off_in_16_bits:.1e}")
    print("\n".join(line for each in found for line in each.wrong) or "All of it is as planned.")


if __name__ == "__main__":
    sys.exit(main())
