"""The engine "petals": a model whose blocks are served by a swarm.

Knows the Petals client, tokenizers and the state of the swarm. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hivemind import DHT
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from jinja2 import TemplateError
from petals.client.routing.sequence_manager import MissingBlocksError
from petals.utils.auto_config import AutoDistributedModelForCausalLM
from tokenizers.decoders import DecodeStream
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from petals_win.engines.base import (
    ContextTooLong,
    Event,
    Finished,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    PeerStatus,
    SwarmStatus,
    SwarmUnavailable,
    Token,
    Usage,
    block_ranges,
)
from petals_win.engines.stopping import StopStrings
from petals_win.errors import UserError
from petals_win.span.source import ModelSource, open_model
from petals_win.swarm.state import SwarmState, read_state

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0  # between two looks at the swarm
_MAX_RETRIES = 5  # of one step; with the back-off of petals' client that is about 15 s
_CONCURRENT = 16  # generations at once; each has its thread


class PetalsEngine:
    """Answers by `generate()` of transformers, with the blocks of the model in the swarm of `dht`."""

    def __init__(self, source: ModelSource, model: Any, dht: DHT):
        self._source, self._model, self._dht = source, model, dht
        self._tokenizer = source.tokenizer()
        self._card = ModelCard(source.name, int(time.time()), source.context_length)
        self._threads = ThreadPoolExecutor(_CONCURRENT, thread_name_prefix="generate")
        self._running: set[threading.Event] = set()
        self._state = SwarmState(source.num_blocks, ())
        self._poller: asyncio.Task[None] | None = None

    @classmethod
    def connect(cls, model: str, peers: Sequence[str], *, token: str | None = None) -> PetalsEngine:
        """Join the swarm of `peers` as a client and load what of the model is computed here. Blocks until done.

        Raises UserError if the model cannot be opened or none of the peers answers.
        """
        source = open_model(model, token=token)
        dht = DHT(initial_peers=list(peers), client_mode=True, start=True, startup_timeout=30, use_relay=True)
        try:
            distributed = AutoDistributedModelForCausalLM.from_pretrained(
                model, token=token, dht=dht, initial_peers=tuple(peers), max_retries=_MAX_RETRIES, show_route=False
            )
        except BaseException:
            dht.shutdown()
            raise
        return cls(source, distributed.eval(), dht)

    def models(self) -> list[ModelCard]:
        return [self._card]

    def status(self) -> SwarmStatus:
        state = self._state
        missing = state.missing_blocks
        peers = tuple(PeerStatus(peer.peer_id, peer.start, peer.end, peer.name) for peer in state.peers if peer.online)
        if missing:
            detail = f"No node serves the blocks {block_ranges(missing)} of {self._card.id}."
        else:
            detail = f"{len(peers)} nodes serve all {state.num_blocks} blocks of {self._card.id}."
        return SwarmStatus(not missing, detail, missing, peers)

    async def watch(self) -> None:
        """Start to follow the state of the swarm on the running loop; returns after the first look."""
        await self._look()
        self._poller = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self._look()

    async def _look(self) -> None:
        try:
            self._state = await read_state(self._dht, self._source.dht_prefix, self._source.num_blocks)
        except Exception as e:
            logger.warning("The swarm could not be read: %s", e)
            self._state = SwarmState(self._source.num_blocks, ())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if request.model != self._card.id:
            raise ModelNotFound(request.model, [self._card.id])
        prompt = self._encode(request)
        room = self._card.context_length - len(prompt)
        if room < 1:
            raise ContextTooLong(len(prompt), self._card.context_length)
        if self._state.missing_blocks:
            await self._look()
            if self._state.missing_blocks:
                raise SwarmUnavailable(self._state.missing_blocks)
        limit = min(request.max_tokens or room, room)

        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        cancelled = threading.Event()
        self._running.add(cancelled)

        def put(token: int | None) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        work = loop.run_in_executor(self._threads, self._run, prompt, limit, request, put, cancelled)
        text, stops = DecodeStream(skip_special_tokens=True), StopStrings(request.stop)
        generated, last = 0, None
        try:
            while not stops.stopped and (token := await tokens.get()) is not None:
                generated, last = generated + 1, token
                piece = stops.feed(text.step(self._tokenizer.backend_tokenizer, token) or "")
                if piece:
                    yield Token(piece)
            if not stops.stopped:
                await work  # its exception, if it failed
                if rest := stops.flush():
                    yield Token(rest)
            yield Finished("stop" if stops.stopped or last in self._end_tokens() else "length")
            yield Usage(len(prompt), generated)
        finally:
            cancelled.set()
            self._running.discard(cancelled)
            await asyncio.wait([work])

    def _encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of the prompt. Raises UserError if there are none, or none that the model knows."""
        if request.messages is not None:
            tokens = self._apply_template([dict(message) for message in request.messages])
        elif isinstance(request.prompt, str):
            tokens = self._tokenizer(request.prompt)["input_ids"]
        else:
            tokens = list(request.prompt or ())
        if not tokens:
            raise UserError("The prompt is empty. Send at least one token of text.")
        size = self._model.config.get_text_config(decoder=True).vocab_size
        if unknown := [token for token in tokens if not 0 <= token < size]:
            raise UserError(f"{self._card.id} has the tokens 0 to {size - 1}, but the prompt has {unknown[0]}.")
        return tokens

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self._card.id} was not made for chats: it has no chat template. Send a prompt to /v1/completions instead."
            )
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as e:
            raise UserError(f"The chat template of {self._card.id} does not take these messages: {e.message}.") from e

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _run(
        self,
        prompt: list[int],
        limit: int,
        request: GenerationRequest,
        put: Callable[[int | None], None],
        cancelled: threading.Event,
    ) -> None:
        """Generate in a worker thread; `put` gets each token, and None at the end whatever happens."""
        try:
            with self._model.inference_session(max_length=len(prompt) + limit) as session:
                self._model.generate(
                    torch.tensor([prompt]),
                    session=session,
                    max_new_tokens=limit,
                    streamer=_Streamer(put),
                    stopping_criteria=StoppingCriteriaList([_Cancelled(cancelled)]),
                    **_sampling(request, self._model.generation_config),
                )
        except MissingBlocksError as e:
            raise SwarmUnavailable(e.block_indices) from e
        except (TimeoutError, ConnectionError, P2PDaemonError, P2PHandlerError, StopAsyncIteration) as e:
            raise SwarmUnavailable(()) from e
        finally:
            put(None)

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
            self._poller = None
        for cancelled in self._running:
            cancelled.set()
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        self._threads.shutdown()
        self._model.blocks.sequence_manager.shutdown()
        self._dht.shutdown()


def _sampling(request: GenerationRequest, default: GenerationConfig) -> dict[str, Any]:
    """Arguments of generate() for what the request asks; what it leaves open is the model's own default.

    Sampling is done by our last logits processor, which leaves one token to choose, so generate() itself is greedy.
    """

    def chosen(name: str) -> Any:
        value = getattr(request, name)
        return getattr(default, name) if value is None and default.do_sample else value

    arguments: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if request.repetition_penalty is not None:
        arguments["repetition_penalty"] = request.repetition_penalty
    temperature, top_k, top_p = chosen("temperature"), chosen("top_k"), chosen("top_p")
    asked = default.do_sample or any(v is not None for v in (request.temperature, request.top_k, request.top_p))
    if not asked or temperature == 0:
        return arguments
    warpers = LogitsProcessorList()
    if temperature is not None and temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    warpers.append(_SeededChoice(request.seed))
    arguments["logits_processor"] = warpers
    return arguments


class _Streamer(BaseStreamer):
    """Hands generated tokens on as they come; transformers puts the prompt first."""

    def __init__(self, put: Callable[[int | None], None]):
        self._put = put
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._put(token)
        self._prompt_seen = True

    def end(self) -> None:
        """The end is told by the worker, also when generate() fails."""


class _Cancelled(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), dtype=torch.bool)


class _SeededChoice(LogitsProcessor):
    """Draws the next token with a generator of its own and leaves only that one to choose.

    torch's global generator is shared by all requests of the process, so a seed there would not repeat an answer.
    """

    def __init__(self, seed: int | None):
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        choice = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        return torch.full_like(scores, float("-inf")).scatter(1, choice, 0.0)
