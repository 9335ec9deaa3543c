"""The engine "local": a whole model in this process, without a swarm.

Knows how a model is put together on one PC, and how its answers share the memory. Does not know text, networks or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_win.client.decode import DecodeLoop
from petals_win.client.hollow import hollow_model
from petals_win.engines.base import Engine, Full, GenerationRequest, ModelCard, SwarmStatus
from petals_win.engines.constraints import Constraints
from petals_win.engines.local_blocks import LocalBlocks
from petals_win.engines.offers import Offer
from petals_win.engines.registry import EngineSettings
from petals_win.engines.sampling import sampler
from petals_win.engines.text import TextEngine
from petals_win.engines.tokens import Language, nobody_counts
from petals_win.errors import NodeFull, NodeRefused, UserError
from petals_win.host.memory import available_bytes, keep_within_card
from petals_win.models.source import ModelSource, open_model
from petals_win.node.budget import CacheBudget
from petals_win.span.choices import choose_device, choose_dtype, choose_quant
from petals_win.span.compute import ComputeThread
from petals_win.span.needs import SPARE, Needs, least_cache_tokens, needs_of, session_budget
from petals_win.span.peak import bytes_of_a_pass
from petals_win.span.quantized_linear import Quant
from petals_win.span.span import Span

_MIB = 2**20


def open_engine(settings: EngineSettings) -> TextEngine:
    """Load the model that the settings name. Raises UserError if it cannot be opened, or does not fit into this PC."""
    return TextEngine(LocalEngine.load(_fitting(settings)))


def offer(settings: EngineSettings) -> Offer:
    """The model that the settings name, before it is loaded. Raises UserError as `open_engine`, as far as is known then."""
    here = _fitting(settings)
    card = ModelCard(here.source.name, int(time.time()), here.source.context_length)

    def promised(engine: Engine) -> dict[str, int]:
        local = cast(LocalEngine, cast(TextEngine, engine).tokens)
        return {str(here.device): local.promised_bytes}

    return Offer("local", (card,), partial(open_engine, settings), True, takes=here.takes, promised=promised)


def _fitting(settings: EngineSettings) -> WholeModel:
    if settings.peers:
        raise UserError(
            "The engine 'local' computes on this PC alone, so --peers are of no use to it. Leave them out, or take --engine petals."
        )
    here = whole_model_here(settings)
    if not here.fits:
        raise UserError(
            f"{here.source.name} does not fit into this PC: {here.sizes}. Close other programs, or choose a smaller model."
        )
    return here


@dataclass(frozen=True)
class WholeModel:
    """A model as this PC would compute it alone."""

    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    quant: Quant
    needs: Needs

    @property
    def fits(self) -> bool:
        """Whether what is free now has room for it, and something stays free."""
        return all(size <= (1 - SPARE) * available_bytes(device) for device, size in self.takes.items())

    @property
    def takes(self) -> dict[str, int]:
        """Bytes, by device, of the weights and one long conversation."""
        takes = {str(self.device): self._on_device}
        takes["cpu"] = takes.get("cpu", 0) + self.needs.outside_bytes
        return takes

    @property
    def _on_device(self) -> int:
        tokens = min(self.source.context_length, self.needs.cache_tokens)
        return sum(self.needs.block_bytes) + tokens * sum(self.needs.cache_bytes_per_token)

    @property
    def sizes(self) -> str:
        """How much memory the model takes, and how much there is, as part of a sentence."""
        size = (self._on_device + self.needs.outside_bytes) / _MIB
        free = available_bytes(self.device) / _MIB
        return (
            f"it takes {size:,.0f} MiB with room for a conversation, and of the {free:,.0f} MiB that are free on {self.device} "
            "a tenth is spared"
        )


def whole_model_here(settings: EngineSettings) -> WholeModel:
    """Look at a model's configuration and at this PC. Raises UserError if the model cannot be opened, or computed as asked."""
    source = open_model(settings.model, token=settings.token)
    device = choose_device(settings.device)
    dtype, quant = choose_dtype(settings.dtype, source, device), choose_quant(settings.quant, device, source=source)
    needs = needs_of(source.config, dtype, quant, source.in_few_bits_on(device.type))
    return WholeModel(source, device, dtype, quant, needs)


class PcFull(Full):
    """This PC had no room for the answer in time. `reason` says what takes it."""

    def __init__(self, reason: str):
        super().__init__(f"{reason} Try again in a moment.")


class LocalEngine:
    """A TokenEngine: embeddings, all blocks and the head on one compute thread, whose turns all answers share."""

    def __init__(
        self,
        source: ModelSource,
        language: Language,
        model: PreTrainedModel,
        decode: DecodeLoop,
        span: Span,
        compute: ComputeThread,
        budget: CacheBudget,
    ):
        self.language, self._constraints = language, Constraints(language)
        self._model, self._decode, self._compute = model, decode, compute
        self._blocks = LocalBlocks(span, compute, budget)
        self._card = ModelCard(source.name, int(time.time()), source.context_length)
        self._num_blocks = span.num_blocks
        self._closed = False

    @classmethod
    def load(cls, whole: WholeModel) -> LocalEngine:
        """Load everything; blocks until done. Raises UserError for a checkpoint that is damaged or leaves no room."""
        source, device = whole.source, whole.device
        tokenizer = source.tokenizer()  # before anything slow: it may be missing
        compute = ComputeThread()
        compute.start()
        try:
            compute.submit(keep_within_card, device).result()
            loading = compute.submit(
                Span.load, source, 0, source.num_blocks, dtype=whole.dtype, device=device, quant=whole.quant
            )
            span = loading.result()
            model = compute.submit(hollow_model, source, nn.Identity(), dtype=whole.dtype).result().eval()
            decode = compute.submit(DecodeLoop, model, compute).result()
            token_bytes = span.cache_bytes_per_token
            least = least_cache_tokens(source.config) * token_bytes
            free = available_bytes(device) - compute.submit(bytes_of_a_pass, span, source.context_length).result()
            budget = CacheBudget(session_budget(free, least, token_bytes, device))
        except BaseException:
            compute.stop()
            raise
        return cls(source, Language.of(tokenizer, model), model, decode, span, compute, budget)

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """There is nothing to follow, and nothing that could be lost."""

    def card(self) -> ModelCard:
        """The context is the model's, or what there is memory for."""
        return replace(self._card, context_length=self._blocks.longest(self._card.context_length))

    @property
    def promised_bytes(self) -> int:
        """What answers may still come to take of the device's memory, beside what is held now."""
        return self._blocks.promised_bytes

    def status(self) -> SwarmStatus:
        if self._closed:
            missing = tuple(range(self._num_blocks))
            return SwarmStatus(False, "petals-win is ending.", missing, num_blocks=self._num_blocks)
        detail = f"All {self._num_blocks} blocks of {self._card.id} are on this PC."
        return SwarmStatus(True, detail, num_blocks=self._num_blocks, cache_usage=self._blocks.cache_usage)

    async def generate(
        self, prompt: list[int], request: GenerationRequest, limit: int, cached: Callable[[int], None] = nobody_counts
    ) -> AsyncGenerator[int, None]:
        guide = await self._constraints.guide(request.constraint, prompt)
        choose = sampler(request, self._model, prompt, limit, guide)
        known, ended = list(prompt), len(prompt) + limit
        while True:
            before = len(known)
            session = self._blocks.open(ended, tuple(known))
            tokens = self._decode.generate(
                session, known, choose=choose, limit=ended - len(known), ends=self.language.ends
            )
            try:
                async for token in tokens:
                    if len(known) == len(prompt):
                        cached(session.cached_tokens)
                    known.append(token)
                    yield token
                return
            except NodeFull as e:
                # What was let in has come to want more than is left: it gives back all, waits in the line and starts over.
                if len(known) == before:
                    raise PcFull(e.sentence) from e
            except NodeRefused as e:
                raise UserError(e.sentence) from e
            finally:
                await tokens.aclose()
                await session.close(known)

    async def embed(self, tokens: list[int]) -> list[float]:
        session = self._blocks.open(len(tokens))
        try:
            return await self._decode.mean_state(session, tokens)
        except NodeFull as e:
            raise PcFull(e.sentence) from e
        except NodeRefused as e:
            raise UserError(e.sentence) from e
        finally:
            await session.close()

    async def close(self) -> None:
        self._closed = True
        self._blocks.give_up()
        await asyncio.to_thread(self._compute.stop)
