"""What losses of nodes cost: one of two nodes with the same blocks is killed, frozen or cut off while eight answers run, again and again.

Run by scripts/losses, in .venv. The model is small, random, and made here; the swarm is on loopback: one node for the first blocks, two for
the others. A node is killed with its p2pd, and another one takes its place; frozen with its p2pd, as a PC that goes to sleep, or alone; cut
off by freezing its p2pd alone, which keeps its connections and passes nothing on in either direction. At last all holders of the blocks are
lost together, and come back.

Texts have to be equal to transformers' own. Prompts are such that its two best logits are never close, so that there is no excuse.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from petals_win.client.pages import LeftPages
from petals_win.engines.base import GenerationRequest, SwarmUnavailable
from petals_win.engines.petals import PetalsEngine
from petals_win.models.source import open_model
from petals_win.swarm.local import LocalNode, LocalSwarm

KINDS = ("kill", "freeze", "cut")
BLOCKS, FIRST, SHARED = 4, "0:2", "2:4"
VOCABULARY, CONTEXT = 320, 4096
STREAMS, OF_LONG_PROMPTS = 8, 2
SHORT, LONG = (12, 48), (1500, 16)  # tokens of a prompt, and of its answer
CLEAR_LOGITS = 1e-3  # that the two best of the reference are apart at least

# In seconds: of silence, until an error when all is lost, until it works again.
MOST_GAP, MOST_LOST, MOST_BACK = 6.0, 15.0, 10.0
_MOVE_SECONDS = 40.0  # for all streams to go on after a loss
_READY_SECONDS = 60.0  # for a new node to serve
_USED_SECONDS = 20.0  # from there until the client counts on it
_PREFILL_SECONDS = 5.0  # that a loss waits for a stream in prefill


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    answer: list[int]


@dataclass
class Figures:
    """Of one kind of loss."""

    losses: int = 0
    streams_hit: int = 0
    of_them_in_prefill: int = 0
    worst_gap_s: float = 0.0
    gaps_too_long: int = 0
    texts: int = 0
    texts_wrong: int = 0
    errors: list[str] = field(default_factory=list)


def make_model(folder: Path) -> Path:
    """A checkpoint with a tokenizer. Weights are larger than usual, since otherwise all tokens look alike."""
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        eos_token_id=None,
        **shape,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


def make_prompts(folder: Path, chance: random.Random, tokens: tuple[int, int], count: int) -> list[Prompt]:
    """Random prompts, with what transformers answers to them."""
    model: Any = open_model(str(folder)).whole_model(torch.float32)
    length, new = tokens
    made: list[Prompt] = []
    while len(made) < count:
        ids = [chance.randrange(1, VOCABULARY) for _ in range(length)]
        with torch.inference_mode():
            answered: Any = model.generate(
                torch.tensor([ids]),
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.cat(answered.logits).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > CLEAR_LOGITS:
            made.append(Prompt(ids, answered.sequences[0, length:].tolist()))
    return made


class Stream:
    """Asks one question after the other until it is told to stop, or until an error where that is the end."""

    def __init__(self, engine: PetalsEngine, prompts: list[Prompt], told: Callable[[], Figures | None]):
        self._engine, self._prompts, self._told = engine, prompts, told
        self.last_sign = time.monotonic()  # of the last token, or the beginning of the question, or the answer's end
        self.tokens = 0  # of all answers
        self.in_prefill = False
        self.ends_at_error = False
        self.error: Exception | None = None

    async def run(self) -> None:
        for number in range(sys.maxsize):
            prompt = self._prompts[number % len(self._prompts)]
            if len(prompt.ids) == LONG[0] and number % 2 == 0:  # so that long prompts are computed, and found again
                self._engine._blocks.routes.left = LeftPages()
            try:
                answer = await self._ask(prompt)
            except Exception as e:
                if self.ends_at_error:
                    self.error = e
                    return
                if (figures := self._told()) is not None:
                    figures.errors.append(f"{type(e).__name__}: {e}")
                await asyncio.sleep(0.5)
                continue
            if (figures := self._told()) is not None:
                figures.texts += 1
                figures.texts_wrong += answer != prompt.answer

    async def _ask(self, prompt: Prompt) -> list[int]:
        self.last_sign, self.in_prefill = time.monotonic(), True
        answer: list[int] = []
        request = GenerationRequest("", prompt=tuple(prompt.ids), temperature=0.0)
        async with contextlib.aclosing(self._engine.generate(prompt.ids, request, len(prompt.answer))) as tokens:
            async for token in tokens:
                self._note()
                self.tokens += 1
                self.in_prefill = False
                answer.append(token)
        self._note()  # whoever reads along waits for the end, too, at which nodes are told
        return answer

    def _note(self) -> None:
        now = time.monotonic()
        gap, self.last_sign = now - self.last_sign, now
        if (figures := self._told()) is not None:
            figures.worst_gap_s = max(figures.worst_gap_s, round(gap, 2))
            figures.gaps_too_long += gap > MOST_GAP


class Loss:
    """A node that is lost by one of the KINDS; if it was not killed, until `resume`."""

    def __init__(self, kind: str, node: LocalNode, chance: random.Random):
        python = psutil.Process(node.child.pid)
        daemons = python.children(recursive=True)
        self.kind, self._node = kind, node
        self._frozen: list[psutil.Process] = []
        if kind == "kill":
            for process in (python, *daemons):
                with contextlib.suppress(psutil.NoSuchProcess):  # p2pd ends with its node
                    process.kill()
            return
        with_p2pd = [python, *daemons] if chance.random() < 0.5 else [python]
        self._frozen = daemons if kind == "cut" else with_p2pd
        for process in self._frozen:
            process.suspend()

    def resume(self) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []


class Soak:
    """A swarm whose nodes are lost, and the streams that must not notice."""

    def __init__(self, swarm: LocalSwarm, engine: PetalsEngine, prompts: list[list[Prompt]], chance: random.Random):
        self._swarm, self._engine, self._chance = swarm, engine, chance
        self._holders = swarm.nodes[1:]
        self._figures: Figures | None = None
        self._losses: list[Loss] = []
        self._spare: LocalNode | None = None
        self._prompts = prompts
        self.streams: list[Stream] = []
        self._running: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        self.streams = [Stream(self._engine, prompts, lambda: self._figures) for prompts in self._prompts]
        self._running = [asyncio.create_task(stream.run()) for stream in self.streams]
        try:
            yield
        finally:
            for each in self._running:
                each.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def lose_one(self, kind: str, figures: Figures) -> None:
        """One loss, from a random moment on until all streams have gone on and the node is back."""
        await asyncio.sleep(self._chance.uniform(0, 1))
        in_prefill = self._chance.random() < 0.5
        if in_prefill:
            in_prefill = await self.until(lambda: bool(self._in_prefill()), _PREFILL_SECONDS)
            await asyncio.sleep(self._chance.uniform(0, 0.1))
        users = {id(node): self._users(node) for node in self._holders}
        # In a prefill the holder that computes one, else the one with most streams.
        victim = max(self._holders, key=lambda node: (in_prefill and any(users[id(node)]), len(users[id(node)])))
        self._figures = figures
        figures.losses += 1
        figures.streams_hit += len(users[id(victim)])
        figures.of_them_in_prefill += sum(users[id(victim)])
        before = [stream.tokens for stream in self.streams]
        loss = Loss(kind, victim, self._chance)
        self._losses.append(loss)
        went_on = await self.until(
            lambda: all(stream.tokens > count + 1 for stream, count in zip(self.streams, before, strict=True)),
            _MOVE_SECONDS,
        )
        if not went_on:
            figures.errors.append(f"after a {kind} a stream did not go on within {_MOVE_SECONDS:.0f} s")
        await self._bring_back(loss, victim)  # until the next loss, whatever follows counts with this one

    def _users(self, node: LocalNode) -> list[bool]:
        """Of each session at the node: whether it is in its first step."""
        peer_id = self._peer_id(node)
        running = [
            session for session in self._engine._running if peer_id in {str(peer) for peer, _, _ in session.route}
        ]
        return [session.position == 0 for session in running]

    async def _bring_back(self, loss: Loss, victim: LocalNode) -> None:
        if loss.kind == "kill":
            self._holders.remove(victim)
            await self._until_usable(await self._add_holder())
        else:
            await asyncio.sleep(self._chance.uniform(0, 1))
            loss.resume()
            await self._until_usable(victim)
        self._losses.remove(loss)

    async def _add_holder(self) -> LocalNode:
        """One more that serves, of which the client need not know yet."""
        if self._spare is None:
            self._spare = self._swarm.prepare_node(SHARED)
        node, self._spare = self._spare, None
        await asyncio.to_thread(self._swarm.let_in, node)
        await asyncio.to_thread(node.wait_for, "serving", _READY_SECONDS)
        self._holders.append(node)
        return node

    async def _until_usable(self, node: LocalNode) -> None:
        peer_id = self._peer_id(node)
        if not await self.until(lambda: peer_id in self._engine.usable(), _USED_SECONDS):
            raise RuntimeError(f"A node that is back is not used again within {_USED_SECONDS:.0f} s")

    def prepare(self) -> None:
        """Let the next node start, since most of that is imports."""
        self._spare = self._spare or self._swarm.prepare_node(SHARED)

    def _in_prefill(self) -> list[Stream]:
        return [stream for stream in self.streams[-OF_LONG_PROMPTS:] if stream.in_prefill]

    @staticmethod
    def _peer_id(node: LocalNode) -> str:
        return node.addresses[0].rpartition("/p2p/")[2]

    async def lose_all(self, kind: str) -> dict[str, Any]:
        """Both holders at once, while the streams run. Returns figures, with what does not hold under "wrong"."""
        wrong: list[str] = []
        self._figures = None
        async with self.streaming():
            if not await self.until(lambda: all(stream.tokens > 2 for stream in self.streams), _MOVE_SECONDS):
                wrong.append(f"not all streams had begun within {_MOVE_SECONDS:.0f} s")
            for stream in self.streams:
                stream.ends_at_error = True
            began = time.monotonic()
            self._losses = [Loss(kind, node, self._chance) for node in self._holders]
            await asyncio.wait(self._running, timeout=2 * MOST_LOST)
            ended = time.monotonic() - began
            errors = [stream.error for stream in self.streams]
        named = [e for e in errors if isinstance(e, SwarmUnavailable) and f"blocks {SHARED} " in str(e)]
        others = {f"{type(e).__name__}: {e}" for e in errors if e not in named}
        if others:
            wrong.append(f"streams did not end in an error that names the blocks: {sorted(others)}")
        if ended > MOST_LOST:
            wrong.append(f"the last stream ended after {ended:.1f} s")
        if kind == "kill":
            self._holders.clear()
            await self._add_holder()
        for loss in self._losses:
            loss.resume()
        back = await self._first_answer()
        if back > MOST_BACK:
            wrong.append(f"the first answer came {back:.1f} s after the blocks")
        self._losses.clear()
        if kind == "kill":
            await self._until_usable(await self._add_holder())
        return {"kind": kind, "last_error_s": round(ended, 2), "works_again_s": round(back, 2), "wrong": wrong}

    async def _first_answer(self) -> float:
        """Seconds until a question is answered, which is asked until it is."""
        began = time.monotonic()
        prompt = self._prompts[0][0]
        while time.monotonic() - began < 3 * MOST_BACK:
            with contextlib.suppress(SwarmUnavailable):
                if await Stream(self._engine, [], lambda: None)._ask(prompt) == prompt.answer:
                    break
            await asyncio.sleep(0.2)
        return time.monotonic() - began

    def resume_all(self) -> None:
        for loss in self._losses:
            loss.resume()


async def soak(folder: Path, swarm: LocalSwarm, asked: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(asked.seed)
    short = make_prompts(folder, chance, SHORT, STREAMS)
    long = make_prompts(folder, chance, LONG, OF_LONG_PROMPTS)
    prompts = [short[n:] + short[:n] for n in range(STREAMS - OF_LONG_PROMPTS)] + [[each] for each in long]
    engine = await asyncio.to_thread(PetalsEngine.connect, str(folder), swarm.peers)
    by_kind = {kind: Figures() for kind in KINDS}
    altogether: list[dict[str, Any]] = []
    await engine.start(lambda why: sys.exit(str(why)))
    run = Soak(swarm, engine, prompts, chance)
    try:
        end = time.monotonic() + 60 * asked.minutes
        async with run.streaming():
            await run.until(lambda: all(stream.tokens > 1 for stream in run.streams), _MOVE_SECONDS)
            for number in range(asked.losses):
                if time.monotonic() > end:
                    break
                kind = KINDS[number % len(KINDS)]
                if kind == KINDS[0]:
                    run.prepare()
                await run.lose_one(kind, by_kind[kind])
                print(f"{number + 1}: {kind} {by_kind[kind]}", file=sys.stderr, flush=True)
        for kind in asked.altogether:
            altogether.append(await run.lose_all(kind))
            print(altogether[-1], file=sys.stderr, flush=True)
    finally:
        run.resume_all()
        await engine.close()
    return {"kinds": {kind: vars(figures) for kind, figures in by_kind.items()}, "altogether": altogether}


def what_is_wrong(found: dict[str, Any]) -> list[str]:
    wrong = []
    for kind, figures in found["kinds"].items():
        for name, what in (("gaps_too_long", f"gaps over {MOST_GAP:.0f} s"), ("texts_wrong", "wrong texts")):
            if figures[name]:
                wrong.append(f"{kind}: {figures[name]} {what}")
        if figures["errors"]:
            wrong.append(f"{kind}: {len(figures['errors'])} errors, the first: {figures['errors'][0]}")
    return wrong + [f"all lost by {each['kind']}: {what}" for each in found["altogether"] for what in each["wrong"]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/losses", description=__doc__.splitlines()[0])
    parser.add_argument("--losses", type=int, default=200, help="of one node, in turns of each kind (default: 200)")
    parser.add_argument("--minutes", type=float, default=60, help="after so many no more are begun (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, moments and victims (default: 0)")
    parser.add_argument(
        "--altogether",
        nargs="*",
        choices=KINDS,
        default=KINDS,
        help="how to lose both holders at last (default: all ways)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = make_model(Path(place) / "tiny")
        with LocalSwarm(str(folder), [FIRST, SHARED, SHARED], options=["--threads", "1"]) as swarm:
            swarm.wait_until_serving()
            found = asyncio.run(soak(folder, swarm, asked))
            began = time.monotonic()
        found["nodes_ended_s"] = round(time.monotonic() - began, 2)
    found["wrong"] = what_is_wrong(found)
    if asked.json:
        print(json.dumps(found))
    else:
        print(f"{'':22}" + "".join(f"{kind:>9}" for kind in KINDS))
        for name in Figures.__dataclass_fields__:
            values = [found["kinds"][kind][name] for kind in KINDS]
            shown = [len(value) if isinstance(value, list) else value for value in values]
            print(f"{name:22}" + "".join(f"{value:9}" for value in shown))
        for each in found["altogether"]:
            print(
                f"all lost by {each['kind']}: errors within {each['last_error_s']} s, works again in {each['works_again_s']} s"
            )
        print("\n".join(found["wrong"]) or "All of it holds.")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
