"""The engine "petals": a model whose blocks are served by a swarm.

Knows the Petals client and the state of the swarm. Does not know text or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from hivemind import DHT
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost
from petals.client.inference_session import InferenceSession, SessionCancelled
from petals.client.routing.sequence_manager import MissingBlocksError
from petals.utils.auto_config import AutoDistributedModelForCausalLM
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from petals_win.client.looking import LookUpFailed
from petals_win.client.rooms import Rooms
from petals_win.daemon.process import DaemonLost
from petals_win.engines.base import (
    GenerationRequest,
    ModelCard,
    PeerStatus,
    SwarmFailed,
    SwarmFull,
    SwarmOutOfReach,
    SwarmRefused,
    SwarmStatus,
    SwarmUnavailable,
    block_ranges,
)
from petals_win.engines.registry import EngineSettings
from petals_win.engines.sampling import generate_arguments
from petals_win.engines.text import TextEngine
from petals_win.engines.tokens import Language
from petals_win.errors import NodeFull, NodeRefused, UserError, printable
from petals_win.models.source import ModelSource, open_model
from petals_win.swarm.revision import check_content
from petals_win.swarm.state import SwarmState, read_state

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0  # between two looks at the swarm
_MAX_RETRIES = 5  # of one step; with the back-off of petals' client that is about 15 s
_CONCURRENT = 16  # generations at once; each has its thread


def open_engine(settings: EngineSettings) -> TextEngine:
    """Join the swarm of the peers. Raises UserError as `PetalsEngine.connect`, and if no peers are named."""
    if not settings.peers:
        raise UserError("Which swarm? Give --peers with the address that 'petals-win serve' prints on another PC.")
    return TextEngine(PetalsEngine.connect(settings.model, settings.peers, token=settings.token))


class PetalsEngine:
    """A TokenEngine: generates by `generate()` of transformers, with the blocks of the model in the swarm of `dht`."""

    def __init__(self, source: ModelSource, model: Any, dht: DHT):
        self._source, self._model, self._dht = source, model, dht
        self.language = Language.of(source.tokenizer(), model)
        self._card = ModelCard(source.name, int(time.time()), source.context_length)
        self._rooms = Rooms(source.swarm_name)
        self._threads = ThreadPoolExecutor(_CONCURRENT, thread_name_prefix="generate")
        self._running: set[_Cancelling] = set()
        self._state = SwarmState(source.num_blocks, ())
        self._poller: asyncio.Task[None] | None = None

    @classmethod
    def connect(cls, model: str, peers: Sequence[str], *, token: str | None = None) -> PetalsEngine:
        """Join the swarm of `peers` as a client and load what of the model is computed here. Blocks until done.

        Raises UserError if the model cannot be opened, none of the peers answers, or they serve another revision of it.
        """
        source = open_model(model, token=token)
        dht = DHT(initial_peers=list(peers), client_mode=True, start=True, startup_timeout=30, use_relay=True)
        try:
            check_content(dht, source.swarm_name)
            distributed = AutoDistributedModelForCausalLM.from_pretrained(
                model, token=token, dht=dht, initial_peers=tuple(peers), max_retries=_MAX_RETRIES, show_route=False
            )
        except BaseException:
            dht.shutdown()
            raise
        return cls(source, distributed.eval(), dht)

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """Follow the state of the swarm. The engine is lost when its daemon has ended."""
        self._dht.lost.add_done_callback(lambda lost: on_lost(DaemonLost(lost.result())))
        await self._look()
        self._poller = asyncio.create_task(self._follow())

    @property
    def _lost(self) -> str | None:
        """Why this engine will never answer again, None while it may."""
        return self._dht.lost.result() if self._dht.lost.done() else None

    def card(self) -> ModelCard:
        """The context is the model's, or what the nodes of a route have room for."""
        longest = self._rooms.longest(self._state) or self._card.context_length
        return replace(self._card, context_length=min(self._card.context_length, longest))

    def status(self) -> SwarmStatus:
        state = self._state
        if self._lost is not None:
            return SwarmStatus(False, self._lost, tuple(range(state.num_blocks)))
        missing = state.missing_blocks
        peers = tuple(PeerStatus(peer.peer_id, peer.start, peer.end, peer.name) for peer in state.peers if peer.online)
        if missing:
            detail = f"No node serves the blocks {block_ranges(missing)} of {self._card.id}."
        else:
            detail = f"{len(peers)} nodes serve all {state.num_blocks} blocks of {self._card.id}."
        return SwarmStatus(not missing, detail, missing, peers)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self._look()

    async def _look(self) -> None:
        try:
            self._state = await read_state(self._dht, self._source.swarm_name, self._source.num_blocks)
            await self._rooms.ask(self._state, self._model.blocks.sequence_manager.state.p2p)
        except Exception as e:
            logger.warning("The swarm could not be read: %s", e)
            self._state = SwarmState(self._source.num_blocks, ())

    async def generate(self, prompt: list[int], request: GenerationRequest, limit: int) -> AsyncGenerator[int, None]:
        if self._lost is not None:
            raise SwarmOutOfReach(self._lost)
        if self._state.missing_blocks:
            await self._look()
            if self._state.missing_blocks:
                raise SwarmUnavailable(self._state.missing_blocks)
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        cancelled = _Cancelling()
        self._running.add(cancelled)

        def put(token: int | None) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        work = loop.run_in_executor(self._threads, self._run, prompt, limit, request, put, cancelled)
        try:
            while (token := await tokens.get()) is not None:
                yield token
            await work  # its exception, if it failed
        finally:
            cancelled.set()
            self._running.discard(cancelled)
            await asyncio.wait([work])

    def _run(
        self,
        prompt: list[int],
        limit: int,
        request: GenerationRequest,
        put: Callable[[int | None], None],
        cancelled: _Cancelling,
    ) -> None:
        """Generate in a worker thread; `put` gets each token, and None at the end whatever happens."""
        try:
            with self._model.inference_session(max_length=len(prompt) + limit) as session:
                cancelled.ends(session)
                self._model.generate(
                    torch.tensor([prompt]),
                    session=session,
                    streamer=_Streamer(put),
                    stopping_criteria=StoppingCriteriaList([_Cancelled(cancelled)]),
                    **generate_arguments(
                        request,
                        self._model.generation_config,
                        prompt_tokens=len(prompt),
                        max_tokens=limit,
                    ),
                )
        except SessionCancelled:
            logger.debug("An answer was given up")
        except NodeFull as e:
            raise SwarmFull(e.sentence) from e
        except NodeRefused as e:
            raise SwarmRefused(e.sentence) from e
        except MissingBlocksError as e:
            raise SwarmUnavailable(e.block_indices) from e
        except (LookUpFailed, P2PDaemonLost) as e:
            raise SwarmOutOfReach(self._lost or str(e)) from e
        except P2PHandlerError as e:
            raise SwarmFailed(f"{printable(str(e))}.") from e
        except (TimeoutError, ConnectionError, P2PDaemonError, StopAsyncIteration) as e:
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


class _Cancelling(threading.Event):
    """Set when nobody waits for an answer any more; it ends the session, too, which may wait for room in a full swarm."""

    def __init__(self) -> None:
        super().__init__()
        self._session: InferenceSession | None = None

    def ends(self, session: InferenceSession) -> None:
        self._session = session
        if self.is_set():
            session.cancel()

    def set(self) -> None:
        super().set()
        if self._session is not None:
            self._session.cancel()


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
