"""One model in one process against the same model in a two-node swarm on loopback, side by side in one run.

Knows what is measured and in which order. Does not know the command line, nor how an engine or transformers is asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from petals_win.bench.asking import Asker, connected
from petals_win.bench.busy import busy_program
from petals_win.bench.figures import Rounds, batch_of, busy_speed_of, speed_of, swarm_figures
from petals_win.bench.one_process import OneProcess, fastest_process
from petals_win.host.memory import own_bytes
from petals_win.host.threads import most_threads
from petals_win.models.cuts import Cuts
from petals_win.models.source import ModelSource, open_model
from petals_win.span.footprint import model_bytes
from petals_win.swarm.local import LocalSwarm

_PROMPT = "The history of computing began with"
_WORDS = (
    "one of the first people who asked how long a machine would take to find all numbers that divide another number"
)
_BESIDE = 4  # answers that are written while a long prompt is read
_REST_SECONDS = 0.3  # between two sides: what has just computed may still wait awake for more


@dataclass(frozen=True)
class BenchReport:
    """Medians over `rounds` rounds of `tokens` greedy tokens for each answer; the sides take turns within a round.

    `figures` has them by name: tokens/s of all answers together, seconds, and ratios, which are medians of the ratios within
    each round; `values` has all that was measured, by round. `prompt` is how many tokens the long prompt had, 0 without one.
    Memory is what a node's process takes beyond what it had before loading its blocks, over the bytes of the whole
    model's weights; `node_overhead_bytes` is what it had. `threads` is what each process computes with
    at most, `local_setting` how the one process was fastest.
    """

    model: str
    rounds: int
    tokens: int
    prompt: int
    figures: dict[str, float]
    values: dict[str, list[float]]
    swarm_won: int
    start_seconds: float
    node_bytes_over_weights: float
    node_overhead_bytes: int
    weights_bytes: int
    threads: int
    local_setting: str

    def as_dict(self) -> dict[str, Any]:
        """With each figure under its own name, and `values` as `all`."""
        rest = {name: value for name, value in vars(self).items() if name not in ("figures", "values")}
        every = {name: [round(value, 4) for value in values] for name, values in self.values.items()}
        return {**rest, **self.figures, "all": every}


def run_bench(
    model: str,
    *,
    rounds: int = 5,
    tokens: int = 32,
    sessions: Sequence[int] = (1, 2, 8, 16),
    prompt: int = 2000,
    report: Callable[[str], None] = lambda _line: None,
) -> BenchReport:
    """Measure. `report` gets a line for each step. Raises UserError if a node cannot be started or does not answer.

    :param sessions: how many answers at once; one is always measured
    :param prompt: tokens of the long prompt, less where the context is shorter; 0 measures none
    """
    return asyncio.run(_measure(model, rounds, tokens, sorted({1, *sessions}), prompt, report))


async def _measure(
    model: str, rounds: int, tokens: int, sessions: Sequence[int], prompt: int, report: Callable[[str], None]
) -> BenchReport:
    source = open_model(model)
    started = time.perf_counter()
    with ExitStack() as ends:
        swarm = ends.enter_context(
            LocalSwarm(
                model, [f"{start}:{end}" for start, end in Cuts.of(source.config).halves], options=["--quant", "none"]
            )
        )
        report("two nodes have joined, loading their blocks")
        await asyncio.to_thread(swarm.wait_until_serving)
        async with connected(model, swarm.peers) as asker:
            start_seconds = time.perf_counter() - started
            report(f"the swarm is ready after {start_seconds:.1f} s; loading the model in one process, too")
            prompts = Prompts(source)
            local, setting = await fastest_process(model, prompts.short(1)[0], ends, report)
            prompt = min(prompt, asker.context_length - 1)
            run = _Run(asker, local, prompts, tokens, sessions, prompt, report)
            _, (text,) = await asker.answers(prompts.short(1), tokens)  # warm up
            node = swarm.nodes[0]
            taken = own_bytes(node.child.pid) - node.bytes_before_loading
            _, (same,) = await local.generate(prompts.short(1), tokens)
            if prompts.decode(same).strip() != text.strip():
                report("note: the two texts differ (rounding)")
            for number in range(1, rounds + 1):
                report(f"round {number} of {rounds}")
                await run.round(number)
    weights = model_bytes(source.config, source.dtype)
    values = run.found.values
    return BenchReport(
        model=source.name,
        rounds=rounds,
        tokens=tokens,
        prompt=prompt,
        figures=swarm_figures(run.found, sessions),
        values=values,
        swarm_won=sum(a > b for a, b in zip(values[speed_of(1)], values["local_tokens_per_s"], strict=True)),
        start_seconds=start_seconds,
        node_bytes_over_weights=taken / weights,
        node_overhead_bytes=node.bytes_before_loading,
        weights_bytes=weights,
        threads=most_threads(),
        local_setting=setting,
    )


class Prompts:
    """Prompts as tokens of a model, always the same ones."""

    def __init__(self, source: ModelSource):
        self._tokenizer = source.tokenizer()
        self._short: list[int] = self._tokenizer(_PROMPT)["input_ids"]
        self._words: list[int] = self._tokenizer(_WORDS, add_special_tokens=False)["input_ids"]

    def short(self, count: int) -> list[list[int]]:
        """So many of one length, each another one from its second token on."""
        first, *others = self._short
        return [self._short, *([first, *self.long(len(others), number)] for number in range(1, count))]

    def long(self, tokens: int, number: int) -> list[int]:
        """Words of a sentence, drawn by the number."""
        return random.Random(number).choices(self._words, k=tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class _Run:
    """The rounds of one run."""

    def __init__(
        self,
        asker: Asker,
        local: OneProcess,
        prompts: Prompts,
        tokens: int,
        sessions: Sequence[int],
        prompt: int,
        report: Callable[[str], None],
    ):
        self._asker, self._local, self._prompts = asker, local, prompts
        self._tokens, self._sessions, self._prompt, self._report = tokens, sessions, prompt, report
        self.found = Rounds()

    async def round(self, number: int) -> None:
        for count in self._sessions:
            await self._one_process(batch_of(count) if count > 1 else "local_tokens_per_s", count)
            await self._swarm(speed_of(count), count)
        with busy_program():
            for count in self._sessions:
                await self._swarm(busy_speed_of(count), count)
        if self._prompt:
            await self._long_prompt(number)

    async def _one_process(self, name: str, count: int) -> None:
        seconds, _ = await self._local.generate(self._prompts.short(count), self._tokens)
        await self._note(name, count * self._tokens / seconds)

    async def _swarm(self, name: str, count: int) -> None:
        seconds, _ = await self._asker.answers(self._prompts.short(count), self._tokens)
        await self._note(name, count * self._tokens / seconds)

    async def _long_prompt(self, number: int) -> None:
        """One that nobody has seen before, then the same again, then another one beside answers."""
        prompt = self._prompts.long(self._prompt, 2 * number)
        seconds, _ = await self._local.generate([prompt], 1)
        await self._note("local_prefill_s", seconds)
        await self._note("prefill_s", await self._asker.first_token(prompt))
        await self._note("prefill_again_s", await self._asker.first_token(prompt))
        another = self._prompts.long(self._prompt, 2 * number + 1)
        alone, beside = await self._asker.beside_a_prompt(self._prompts.short(_BESIDE), another, self._tokens)
        await self._note("token_s", alone)
        await self._note("token_beside_prefill_s", beside)

    async def _note(self, name: str, value: float) -> None:
        self.found.add(name, value)
        self._report(f"    {name} {value:.4g}")
        await asyncio.sleep(_REST_SECONDS)
