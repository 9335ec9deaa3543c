"""The engine "onnx": a whole model on this PC, by ONNX Runtime, on a card of any maker or on the CPU.

Knows how such a folder becomes an engine, and hands tokens between the thread that computes and the event loop. Does not know graphs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from petals_win.engines.base import Engine, GenerationRequest, ModelCard, SwarmStatus
from petals_win.engines.constraints import Constraints
from petals_win.engines.offers import Offer
from petals_win.engines.onnx_steps import Steps, open_steps
from petals_win.engines.onnx_turns import Answer, Turns
from petals_win.engines.registry import EngineSettings
from petals_win.engines.sampling import sampler
from petals_win.engines.text import TextEngine
from petals_win.engines.tokens import Language, end_tokens, nobody_counts
from petals_win.errors import UserError
from petals_win.host.memory import available_bytes
from petals_win.host.threads import most_threads
from petals_win.models.onnx_devices import check_device
from petals_win.models.onnx_folder import CONFIG, OnnxFolder, is_onnx_folder, open_onnx_folder
from petals_win.span.compute import ComputeThread
from petals_win.span.needs import session_budget

_LEAST_TOKENS = 4096  # for which there shall be memory, if it fits
_CACHE_NUMBER_BYTES = 4  # of a number in a cache, at most
_LOOK_AGAIN_S = 0.1  # whether there is memory for those that wait while nothing is computed


def open_engine(settings: EngineSettings) -> TextEngine:
    """Load the folder that the settings name. Raises UserError if it is none, or is damaged, or this PC cannot compute it."""
    return TextEngine(OnnxEngine.load(_folder(settings)))


def offer(settings: EngineSettings) -> Offer:
    """The model that the settings name, before it is loaded. Raises UserError as `open_engine`, as far as is known then."""
    folder = _folder(settings)
    card = ModelCard(folder.name, int(time.time()), folder.context_length)
    load = partial(open_engine, settings)
    if folder.device != "cpu":
        return Offer("onnx", (card,), load, True, alone_on=folder.device)
    tokens = min(_LEAST_TOKENS, folder.context_length)
    takes = {"cpu": folder.graph_bytes + tokens * folder.cache_numbers * _CACHE_NUMBER_BYTES}

    def promised(engine: Engine) -> dict[str, int]:
        return {"cpu": cast(OnnxEngine, cast(TextEngine, engine).tokens).promised_bytes}

    return Offer("onnx", (card,), load, True, takes=takes, promised=promised)


def _folder(settings: EngineSettings) -> OnnxFolder:
    if settings.peers:
        raise UserError(
            "The engine 'onnx' computes on this PC alone, so --peers are of no use to it. Leave them out, or take --engine petals."
        )
    if settings.device or settings.dtype or settings.quant:
        raise UserError(
            "A model for ONNX Runtime has its device and precision from when it was converted. Leave out --device, --dtype and --quant, "
            "or convert it anew with the --device and --precision of 'petals-win convert'."
        )
    if not is_onnx_folder(settings.model):
        raise UserError(
            f"{settings.model} is no model for ONNX Runtime: there is no {CONFIG}. Make one of it with 'petals-win convert "
            f"{settings.model} --to onnx', and give the folder that it makes as --model."
        )
    return open_onnx_folder(Path(settings.model).expanduser())


class OnnxEngine:
    """A TokenEngine: all answers in turns on one compute thread."""

    def __init__(self, folder: OnnxFolder, language: Language, steps: Steps, compute: ComputeThread) -> None:
        self.language, self._constraints = language, Constraints(language)
        self._compute, self._turns, self.steps = compute, Turns(steps), steps
        self._stand_in = _stand_in(folder)
        longest = min(folder.context_length, steps.budget // steps.token_bytes)
        self._card = ModelCard(folder.name, int(time.time()), longest)
        self._num_blocks, self._device = folder.num_layers, folder.device
        self._new: list[Answer] = []
        self._leaving: list[Answer] = []
        self._queues: dict[Answer, asyncio.Queue[int | None]] = {}
        self._wake = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    def load(cls, folder: OnnxFolder) -> OnnxEngine:
        """Load everything; blocks until done. Raises UserError for what is damaged, or finds no memory."""
        language = Language(folder.tokenizer(), folder.vocabulary, end_tokens(folder.generation))
        check_device(folder.device)
        compute = ComputeThread()
        compute.start()

        def budget(token_bytes: int) -> int:
            least = min(_LEAST_TOKENS, folder.context_length) * token_bytes
            return session_budget(available_bytes(), least, token_bytes, torch.device("cpu"))

        try:
            steps = compute.submit(open_steps, folder, most_threads(), budget).result()
        except BaseException:
            compute.stop()
            raise
        return cls(folder, language, steps, compute)

    @property
    def promised_bytes(self) -> int:
        """What answers may still come to take of the memory, beside what is held now."""
        return max(self.steps.budget - self.steps.held, 0)

    @property
    def held(self) -> int:
        """What is held for answers, in a unit of its own; 0 if there are none."""
        return self._turns.held + len(self._queues)

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """There is nothing to follow, and nothing that could be lost."""

    def card(self) -> ModelCard:
        """The context is the model's, or what there is memory for."""
        return self._card

    def status(self) -> SwarmStatus:
        if self._closed:
            missing = tuple(range(self._num_blocks))
            return SwarmStatus(False, "petals-win is ending.", missing, num_blocks=self._num_blocks)
        detail = f"{self._card.id} is on this PC, for ONNX Runtime on {self._device}."
        return SwarmStatus(True, detail, num_blocks=self._num_blocks, cache_usage=self._turns.usage)

    async def generate(
        self, prompt: list[int], request: GenerationRequest, limit: int, cached: Callable[[int], None] = nobody_counts
    ) -> AsyncGenerator[int, None]:
        guide = await self._constraints.guide(request.constraint, prompt)
        choose = sampler(request, self._stand_in, prompt, limit, guide)
        if self._closed:
            raise RuntimeError("This engine was closed")
        answer = Answer(prompt, choose, limit, self.language.ends)
        queue = self._queues[answer] = asyncio.Queue[int | None]()
        self._new.append(answer)
        self._call()
        cached(0)
        try:
            while (token := await queue.get()) is not None:
                yield token
            if answer.error is not None:
                raise answer.error
        finally:
            await self._leave(answer, queue)

    async def _leave(self, answer: Answer, queue: asyncio.Queue[int | None]) -> None:
        """Returns when nothing is held for the answer any more, at the latest after the turn in work."""
        if answer in self._queues:
            self._leaving.append(answer)
            self._call()
            while await queue.get() is not None:
                pass

    def _call(self) -> None:
        """See to it that turns are taken."""
        self._wake.set()
        if self._working is None:
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Turn after turn, and wait while there is nothing to do."""
        while not self._closed:
            if not self._turns.computes and not self._new and not self._leaving:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _LOOK_AGAIN_S if self._turns.waits else None)
            self._wake.clear()
            new, self._new = self._new, []
            leaving, self._leaving = self._leaving, []
            try:
                told = await self._compute.submit(self._turns.turn, new, leaving)
            except RuntimeError:
                if self._closed:
                    return
                raise
            for answer in told:
                self._tell(answer)

    def _tell(self, answer: Answer) -> None:
        news, answer.news = answer.news, []
        if (queue := self._queues.get(answer)) is None:
            return
        for token in news:
            queue.put_nowait(token)
        if answer.ended:
            del self._queues[answer]
            queue.put_nowait(None)

    async def embed(self, tokens: list[int]) -> list[float]:
        raise UserError(
            "A model for ONNX Runtime gives no hidden states, so there are no embeddings of it. Take --engine local for them."
        )

    async def close(self) -> None:
        self._closed = True
        self._wake.set()
        await asyncio.to_thread(self._compute.stop)
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])
        for answer in list(self._queues):
            answer.error, answer.ended = answer.error or RuntimeError("This engine was closed"), True
            self._tell(answer)
        self._turns.turn([], [*self._turns.all, *self._new])


def _stand_in(folder: OnnxFolder) -> PreTrainedModel:
    """A model of next to no size: how tokens are chosen is asked of transformers, which wants a model for it."""
    config = LlamaConfig(
        vocab_size=folder.vocabulary,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=folder.context_length,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).eval()
    model.generation_config = folder.generation
    return model
