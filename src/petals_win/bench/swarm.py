"""One model in one process against the same model in a two-node swarm on loopback, side by side in one run.

Knows transformers, the Petals client and the nodes' processes. Does not know the command line.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from petals.utils.auto_config import AutoDistributedModelForCausalLM

from petals_win.host.threads import most_threads
from petals_win.models.source import open_model
from petals_win.span.footprint import model_bytes
from petals_win.swarm.local import LocalSwarm

_PROMPT = "The history of computing began with"


@dataclass(frozen=True)
class BenchReport:
    """Medians over `rounds` rounds of `tokens` greedy tokens each; the sides take turns within a round.

    Memory is of the resident set: what a node's process takes beyond what it had before loading its blocks, over the
    bytes of the whole model's weights; `node_overhead_bytes` is what it had. `threads` is what each process computes with.
    """

    model: str
    rounds: int
    tokens: int
    local_tokens_per_s: float
    swarm_tokens_per_s: float
    ratio: float
    swarm_won: int
    start_seconds: float
    node_bytes_over_weights: float
    node_overhead_bytes: int
    weights_bytes: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_bench(
    model: str, *, rounds: int = 7, tokens: int = 64, report: Callable[[str], None] = lambda _line: None
) -> BenchReport:
    """Measure. `report` gets a line for each step. Raises UserError if a node cannot be started."""
    source = open_model(model)
    half = source.num_blocks // 2
    started = time.perf_counter()
    with LocalSwarm(model, [f"0:{half}", f"{half}:{source.num_blocks}"]) as swarm:
        report("two nodes have joined, loading their blocks")
        swarm.wait_until_serving()
        remote: Any = AutoDistributedModelForCausalLM.from_pretrained(
            model, initial_peers=swarm.peers, show_route=False
        )
        start_seconds = time.perf_counter() - started
        report(f"the swarm is ready after {start_seconds:.1f} s; loading the model in this process, too")
        local = source.whole_model()
        prompt = source.tokenizer()(_PROMPT, return_tensors="pt")["input_ids"]

        def timed(generate: Any) -> tuple[float, torch.Tensor]:
            begin = time.perf_counter()
            text = generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            return tokens / (time.perf_counter() - begin), text

        try:
            for generate in (local.generate, remote.generate):
                timed(generate)  # warm up
            locals_, remotes, same = [], [], True
            for number in range(1, rounds + 1):
                local_speed, local_text = timed(local.generate)
                remote_speed, remote_text = timed(remote.generate)
                same = same and torch.equal(local_text, remote_text)
                locals_.append(local_speed)
                remotes.append(remote_speed)
                report(f"round {number} of {rounds}: {local_speed:.1f} tokens/s here, {remote_speed:.1f} in the swarm")
            if not same:
                report("note: the two texts differ (rounding)")
            weights = model_bytes(source.config, source.dtype)
            node = swarm.nodes[0]
            taken = psutil.Process(node.child.pid).memory_info().rss - node.bytes_before_loading
        finally:
            remote.blocks.sequence_manager.shutdown()
            remote.blocks.sequence_manager.dht.shutdown()
    return BenchReport(
        model=source.name,
        rounds=rounds,
        tokens=tokens,
        local_tokens_per_s=statistics.median(locals_),
        swarm_tokens_per_s=statistics.median(remotes),
        ratio=statistics.median(remotes) / statistics.median(locals_),
        swarm_won=sum(remote > here for remote, here in zip(remotes, locals_, strict=True)),
        start_seconds=start_seconds,
        node_bytes_over_weights=taken / weights,
        node_overhead_bytes=node.bytes_before_loading,
        weights_bytes=weights,
        threads=most_threads(),
    )
