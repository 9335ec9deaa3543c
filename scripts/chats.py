"""Chats as people have them: many at once without a limit, many in a row, and one up to the end of the context whose nodes are lost.

Run by scripts/chats, in .venv, on a swarm of two nodes of this PC behind the API, one model after the other: the default one, and small
random ones with contexts of 4,096 (without grouped heads), 40,960 and 131,072 tokens. Such a model says nothing that would come to an end.
That with 4,096 has no token that ends an answer, so each of its chats is answered when it has got to the end of the context; of the others
two tokens of 257 end one, so that their answers are some hundred tokens long by chance.

Memory is looked at all the time, and held against what a node has said when it began to serve, and against what a plan counts for the
tokens that there were. Chats in a row are twenty that come again and again, greedily, with a limit: of what they leave, nodes keep as
much as nobody else needs, and of different chats that is always more.

A prompt that leaves 48 tokens of the context, and an answer of these, go through three nodes that hold the second half. The one in use is
killed with its p2pd in the middle of the prefill, the next one in the middle of the answer. The text has to be that of transformers' generate().
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from petals_win.bench.chats import Chat, Chats
from petals_win.bench.swarm import Prompts
from petals_win.bench.tiny_model import TinyShape, make_tiny_model
from petals_win.bench.up import up
from petals_win.bench.watching import MemoryWatch
from petals_win.engines.base import GenerationRequest
from petals_win.engines.petals import PetalsEngine
from petals_win.host.memory import own_bytes
from petals_win.models.cuts import Cuts
from petals_win.models.source import DEFAULT_MODEL, ModelSource, open_model
from petals_win.node.served import room_for
from petals_win.span.needs import needs_of
from petals_win.swarm.local import LocalNode, LocalSwarm

DEFAULT = "default"
# By the length of the context. The longest has few heads in few blocks, since attention takes the square of it.
SHAPES = {
    "2048": TinyShape(2048, blocks=4, heads_of_keys=4, ends=0),  # for a quick look
    "4096": TinyShape(4096, blocks=4, heads_of_keys=4, ends=0),
    "40960": TinyShape(40_960, ends=2),
    "131072": TinyShape(131_072, heads=2, heads_of_keys=1, ends=2),
}
MODELS = [DEFAULT, "4096", "40960", "131072"]
TOPICS = (
    *("rain", "bread", "rivers", "the moon", "horses", "glass", "paper", "salt", "bees", "maps"),
    *("clocks", "tea", "bridges", "wool", "coins", "ships", "snow", "chess", "gold", "trains"),
)
ROW_TOKENS = 32  # of an answer in a row
LAST_TOKENS = 48  # of the answer that ends with the context
KILLED_AT = 8  # tokens of it
CLOSE_LOGITS = 1e-4  # the reference's two best, where texts may part
MOST_GROWTH = 1.03  # from when a tenth of the chats in a row are over
ACTIVATIONS_MIB = 256  # beyond what is planned
_MIB = 2**20
_ANSWER_S, _PROMPT_S = 3600.0, 3600.0
_READY_S, _USED_S = 120.0, 60.0
_LOOK_S = 0.002
_SERVING = re.compile(
    r"Serving blocks (\S+) in (\d+) MiB of \S+ memory, with (\d+) MiB for conversations of up to (\d+) tokens"
)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Right:
    """What transformers answers, and how far its two best logits are apart at each token."""

    tokens: list[int]
    margins: list[float]

    def parts_from(self, tokens: Sequence[int]) -> float | None:
        """The margin where another answer parts from it; None if it does not."""
        for number, (right, token) in enumerate(itertools.zip_longest(self.tokens, tokens)):
            if right != token:
                return self.margins[number] if number < len(self.margins) else float("inf")
        return None


def right_answer(source: ModelSource, prompt: Sequence[int], tokens: int) -> Right:
    model: Any = source.whole_model(torch.float32)
    ids = torch.tensor([prompt])
    answered: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(answered.logits).topk(2).values
    return Right(answered.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())


class Node:
    """One of a swarm's nodes: what it has announced, and what its blocks keep for a token, in bytes."""

    def __init__(self, node: LocalNode, source: ModelSource) -> None:
        self.local, self.name = node, f"{node.blocks} ({node.child.pid})"
        start, end = (int(number) for number in node.blocks.split(":"))
        self._token_bytes = sum(needs_of(source.config, torch.float32).cache_bytes_per_token[start:end])
        said = (match for line in node.child.output_tail(200) if (match := _SERVING.search(line)))
        _, weights, sessions, self.longest = (int(text) if text.isdecimal() else 0 for text in next(said).groups())
        self.announced = node.bytes_before_loading + (weights + sessions) * _MIB
        self._served = own_bytes(node.child.pid)
        self._planned = 0

    def figures(self, most: int, lengths: Sequence[int]) -> dict[str, Any]:
        """With `most` bytes at some time, after further chats of so many tokens, which run or have left what they were."""
        self._planned += self._token_bytes * sum(room_for(length, length + length // 4 + 512) for length in lengths)
        return {
            "blocks": self.local.blocks,
            "announced_mib": round(self.announced / _MIB),
            "most_mib": round(most / _MIB),
            "grown_mib": round((most - self._served) / _MIB, 1),
            "planned_mib": round(self._planned / _MIB, 1),
        }


async def chats_of(url: str, nodes: Sequence[Node], pids: dict[str, int], asked: argparse.Namespace) -> dict[str, Any]:
    """By HTTP: all at once, then in a row."""
    async with Chats(url, _ANSWER_S) as chats:
        with MemoryWatch(pids) as watch:
            texts = [
                f"What is {topic}? Say it in a sentence."
                for topic in itertools.islice(itertools.cycle(TOPICS), asked.at_once)
            ]
            together, seconds = await chats.at_once(texts)
            say(f"{_whole(together, chats.context)} of {asked.at_once} at once answered in {seconds:.1f} s")
            sizes: list[dict[str, int]] = []
            texts = [f"What is {topic}?" for topic in itertools.islice(itertools.cycle(TOPICS), asked.in_a_row)]
            began = time.perf_counter()
            row = await chats.in_a_row(texts, lambda: sizes.append(watch.look()), max_tokens=ROW_TOKENS, temperature=0)
            say(f"{_whole(row, chats.context, ROW_TOKENS)} of {asked.in_a_row} in a row answered")
            lengths = [chat.length for chat in (*together, *row[: len(TOPICS)])]
            settled = max(1, asked.in_a_row // 10) - 1
            growth = {
                name: round(max(each[name] for each in sizes[settled:]) / sizes[settled][name], 4) for name in pids
            }
            return {
                "offered_context": chats.context,
                "at_once": {
                    **_told(together, chats.context),
                    "seconds": round(seconds, 1),
                    "tokens_per_s": round(sum(chat.tokens for chat in together) / seconds, 1),
                },
                "in_a_row": {
                    **_told(row, chats.context, ROW_TOKENS),
                    "seconds": round(time.perf_counter() - began, 1),
                    "growth": growth,
                },
                "nodes": [node.figures(watch.most[node.name], lengths) for node in nodes],
            }


def _whole(chats: Sequence[Chat], context: int, most: int | None = None) -> int:
    return sum(chat.is_whole(context, most) for chat in chats)


def _told(chats: Sequence[Chat], context: int, most: int | None = None) -> dict[str, Any]:
    wrong = [
        chat.error or f"{chat.tokens} tokens, {chat.reason}" for chat in chats if not chat.is_whole(context, most)
    ]
    return {
        "asked": len(chats),
        "answered": _whole(chats, context, most),
        "to_the_end_of_the_context": sum(chat.length == context for chat in chats),
        "tokens": sum(chat.tokens for chat in chats),
        "first_wrong": wrong[0] if wrong else "",
    }


class Losses:
    """One answer, whose nodes are killed: the one in use when half of the prompt is through, and the next one in the answer."""

    def __init__(self, engine: PetalsEngine, nodes: Sequence[LocalNode]) -> None:
        self._engine = engine
        self._nodes = {node.addresses[0].rpartition("/p2p/")[2]: node for node in nodes}
        self.killed: list[str] = []
        self.longest_gap = self.first_s = 0.0

    async def until_all_are_used(self) -> None:
        """Nodes are looked up with the first question."""
        request = GenerationRequest("", prompt=(1,))
        async with asyncio.timeout(_USED_S):
            async with contextlib.aclosing(self._engine.generate([1], request, 1)) as coming:
                await anext(coming)
            while not self._engine.usable() >= self._nodes.keys():
                await asyncio.sleep(0.1)

    async def answer(self, prompt: list[int], tokens: int) -> list[int]:
        request = GenerationRequest("", prompt=tuple(prompt), temperature=0.0, ignore_eos=True)
        answer: list[int] = []
        began = last = time.monotonic()
        killing = asyncio.create_task(self._kill_in_prefill(len(prompt) // 2))
        try:
            async with contextlib.aclosing(self._engine.generate(prompt, request, tokens)) as coming:
                async for token in coming:
                    now = time.monotonic()
                    self.first_s = self.first_s or now - began
                    self.longest_gap = max(self.longest_gap, now - last) if answer else 0.0
                    last = now
                    answer.append(token)
                    if len(answer) == KILLED_AT:
                        killing.cancel()
                        self._kill("decode")
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
        return answer

    async def _kill_in_prefill(self, tokens: int) -> None:
        while True:
            for session in self._engine._running:
                if session.position == 0 and session._servers and session._servers[-1].answered >= tokens:
                    self._kill("prefill")
                    return
            await asyncio.sleep(_LOOK_S)

    def _kill(self, when: str) -> None:
        """The node that holds the last blocks of the only answer there is."""
        ((*_, (peer_id, _start, _end)),) = self._engine.routes()
        python = psutil.Process(self._nodes[str(peer_id)].child.pid)
        for process in (python, *python.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # p2pd ends with its node
                process.kill()
        self.killed.append(when)
        say(f"killed a node in {when}")


async def with_losses(
    model: str, swarm: LocalSwarm, nodes: Sequence[Node], prompt: list[int], right: Right
) -> dict[str, Any]:
    with MemoryWatch({node.name: node.local.child.pid for node in nodes}) as watch:
        engine = await asyncio.to_thread(PetalsEngine.connect, model, swarm.peers)
        await engine.start(lambda why: sys.exit(str(why)))
        try:
            losses = Losses(engine, [node.local for node in nodes])
            await losses.until_all_are_used()
            began = time.monotonic()
            async with asyncio.timeout(_PROMPT_S):
                answer = await losses.answer(prompt, len(right.tokens))
            seconds = time.monotonic() - began
        finally:
            await engine.close()
    parts = right.parts_from(answer)
    return {
        "tokens": len(prompt),
        "answer_tokens": len(answer),
        "killed_in": losses.killed,
        "right": parts is None or parts <= CLOSE_LOGITS,
        "close_call": parts is not None and parts <= CLOSE_LOGITS,
        "first_token_s": round(losses.first_s, 1),
        "longest_gap_s": round(losses.longest_gap, 1),
        "seconds": round(seconds, 1),
        "nodes": [node.figures(watch.most[node.name], [len(prompt) + len(right.tokens)]) for node in nodes],
    }


def measure(model: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All of it with one model: a folder, or the default one's name."""
    source = open_model(model)
    halves = [f"{start}:{end}" for start, end in Cuts.of(source.config).halves]
    prompt = Prompts(source).long(source.context_length - LAST_TOKENS, 1)
    began = time.monotonic()
    right = right_answer(source, prompt, LAST_TOKENS)
    say(f"transformers has answered {len(prompt):,} tokens in {time.monotonic() - began:.1f} s")
    options = ["--dtype", "float32"]
    with LocalSwarm(model, halves, options=options) as swarm:
        swarm.wait_until_serving()
        nodes = [Node(node, source) for node in swarm.nodes]
        with up(Path(sys.executable), ["--model", model, "--peers", swarm.peers[0]], "api") as running:
            pids = {node.name: node.local.child.pid for node in nodes}
            found = asyncio.run(chats_of(running.url, nodes, {**pids, "api": running.process.pid}, asked))
        spare = [swarm.prepare_node(halves[-1]) for _ in range(2)]
        for node in spare:
            swarm.let_in(node)
            node.wait_for("serving", _READY_S)
            nodes.append(Node(node, source))
        found["prompt"] = asyncio.run(with_losses(model, swarm, nodes, prompt, right))
    say(f"a prompt of {len(prompt):,} tokens: {found['prompt']}")
    return {"context": source.context_length, **found}


def missed(found: dict[str, Any]) -> Iterator[str]:
    """What one model has not kept, a sentence each."""
    if found["offered_context"] < found["context"]:
        yield f"the nodes have room for {found['offered_context']:,} tokens of one chat, and not for {found['context']:,}"
    for name in ("at_once", "in_a_row"):
        told = found[name]
        if told["answered"] < told["asked"]:
            yield f"{name}: {told['answered']} of {told['asked']} were answered; the first other one: {told['first_wrong']}"
    for name, growth in found["in_a_row"]["growth"].items():
        if growth > MOST_GROWTH:
            yield f"the memory of {name} grew to {growth} of what it was"
    prompt = found["prompt"]
    for node in (*found["nodes"], *prompt["nodes"]):
        if node["most_mib"] > node["announced_mib"] + ACTIVATIONS_MIB:
            yield f"a node of {node['blocks']} took {node['most_mib']} MiB, having announced {node['announced_mib']}"
        if node["grown_mib"] > node["planned_mib"] + ACTIVATIONS_MIB:
            yield f"a node of {node['blocks']} grew by {node['grown_mib']} MiB, with {node['planned_mib']} planned for its tokens"
    if not prompt["right"]:
        yield "the answer to the long prompt is another one than that of transformers"
    for when in {"prefill", "decode"} - {*prompt["killed_in"]}:
        yield f"no node was killed in {when}"


@contextlib.contextmanager
def models(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Where each of them lies."""
    with tempfile.TemporaryDirectory() as place:
        yield {
            name: (
                DEFAULT_MODEL if name == DEFAULT else str(make_tiny_model(Path(place) / f"tiny-{name}", SHAPES[name]))
            )
            for name in names
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chats", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[DEFAULT, *SHAPES],
        default=MODELS,
        help="the default one, and small ones by the length of their context (default: all but 2048)",
    )
    parser.add_argument("--at-once", type=int, default=16, help="chats without a limit (default: 16)")
    parser.add_argument("--in-a-row", type=int, default=200, help="chats one after the other (default: 200)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    asked = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    found: dict[str, dict[str, Any]] = {}
    with models(asked.models) as folders:
        for name, model in folders.items():
            say(f"Model: {name}")
            found[name] = measure(model, asked)
    wrong = [f"{name}: {sentence}" for name, each in found.items() for sentence in missed(each)]
    if asked.json:
        print(json.dumps({**found, "missed": wrong}))
    else:
        for name, each in found.items():
            for part, figures in each.items():
                print(f"{name:8}{part.replace('_', ' '):18}{figures}")
        print("\n".join(wrong) or "All of it holds.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
