"""The engine "petals": a model whose blocks are served by a swarm.

Knows the Petals client and the state of the swarm. Does not know text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hivemind import DHT, PeerID
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost
from petals.client.routing import RemoteSequenceManager
from petals.client.routing.sequence_manager import MissingBlocksError
from petals.data_structures import UID_DELIMITER
from petals.utils.auto_config import AutoDistributedConfig
from torch import nn
from transformers import PreTrainedModel

from petals_win.client.decode import DecodeLoop
from petals_win.client.hollow import hollow_model
from petals_win.client.looking import LookUpFailed
from petals_win.client.rooms import Rooms
from petals_win.client.routes import BlocksLost
from petals_win.client.session import RemoteSession, SwarmBlocks
from petals_win.daemon.process import DaemonLost
from petals_win.dht.joining import patiently
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
from petals_win.engines.constraints import Constraints
from petals_win.engines.registry import EngineSettings
from petals_win.engines.sampling import sampler
from petals_win.engines.text import TextEngine
from petals_win.engines.tokens import Language, nobody_counts
from petals_win.errors import NodeFull, NodeRefused, UserError, printable
from petals_win.models.source import ModelSource, open_model
from petals_win.span.compute import ComputeThread
from petals_win.swarm.revision import check_content
from petals_win.swarm.state import PeerState, SwarmState, read_state

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0  # between two looks at the swarm
_KEPT_SECONDS = 60.0  # that what was seen last counts while looks fail: as long as nodes announce themselves for
_MAX_RETRIES = 5  # of one step; with the pauses between them that is about 15 s


def open_engine(settings: EngineSettings) -> TextEngine:
    """Join the swarm of the peers. Raises UserError as `PetalsEngine.connect`, if no peers are named, or for what nodes decide."""
    if not settings.peers:
        raise UserError("Which swarm? Give --peers with the address that 'petals-win serve' prints on another PC.")
    if settings.device or settings.dtype or settings.quant:
        raise UserError(
            "In a swarm each PC computes its blocks as it was told: give --device, --dtype and --quant to 'petals-win serve' there."
        )
    return TextEngine(PetalsEngine.connect(settings.model, settings.peers, token=settings.token))


class PetalsEngine:
    """A TokenEngine: decodes here, with the blocks of the model in the swarm of `dht`."""

    def __init__(self, source: ModelSource, model: PreTrainedModel, compute: ComputeThread, dht: DHT):
        """`model` is hollow, and computed on the thread `compute`, which runs."""
        self._source, self._model, self._compute, self._dht = source, model, compute, dht
        self.language = Language.of(source.tokenizer(), model)
        self._constraints = Constraints(self.language)
        self._decode = DecodeLoop(model, compute)
        self._nodes = _nodes_of(source, dht)
        self._blocks = SwarmBlocks(self._nodes)
        self._card = ModelCard(source.name, int(time.time()), source.context_length)
        self._rooms = Rooms(source.swarm_name)
        self._running: set[RemoteSession] = set()
        self._state = SwarmState(source.num_blocks, ())
        self._seen = float("-inf")  # when, by the monotonic clock
        self._poller: asyncio.Task[None] | None = None

    @classmethod
    def connect(cls, model: str, peers: Sequence[str], *, token: str | None = None) -> PetalsEngine:
        """Join the swarm of `peers` as a client and load what of the model is computed here. Blocks until done.

        Raises UserError if the model cannot be opened, none of the peers answers, or they serve another revision of it.
        """
        source = open_model(model, token=token)
        of_the_dht = dict(client_mode=True, start=True, startup_timeout=30, use_relay=True)
        dht = patiently(partial(DHT, list(peers), **of_the_dht))
        compute = ComputeThread()
        compute.start()
        try:
            check_content(dht, source.swarm_name)
            hollow = compute.submit(hollow_model, source, nn.Identity()).result()
            return cls(source, hollow.eval(), compute, dht)
        except BaseException:
            compute.stop()
            dht.shutdown()
            raise

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
            return SwarmStatus(False, self._lost, tuple(range(state.num_blocks)), num_blocks=state.num_blocks)
        missing = state.missing_blocks
        peers = tuple(_told_of(peer) for peer in state.peers if peer.online)
        if missing:
            detail = f"No node serves the blocks {block_ranges(missing)} of {self._card.id}."
        else:
            detail = f"{len(peers)} nodes serve all {state.num_blocks} blocks of {self._card.id}."
        return SwarmStatus(not missing, detail, missing, peers, num_blocks=state.num_blocks)

    def routes(self) -> list[list[tuple[PeerID, int, int]]]:
        """Of each answer that runs: the nodes that it uses now, with their blocks [start, end)."""
        return [session.route for session in self._running]

    def usable(self) -> set[str]:
        """The peer ids of the nodes that answers may use now."""
        return {peer_id.to_base58() for peer_id in self._blocks.routes.known}

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """A look that fails says nothing of the nodes: this PC may just be busy, and a question finds out more than it could."""
        try:
            state = await read_state(self._dht, self._source.swarm_name, self._source.num_blocks)
        except Exception as e:
            logger.warning("The swarm could not be read: %s", str(e) or type(e).__name__)
            if time.monotonic() - self._seen > _KEPT_SECONDS:
                self._state = SwarmState(self._source.num_blocks, ())
            return
        self._state, self._seen = state, time.monotonic()
        await self._blocks.routes.learn([PeerID.from_base58(peer.peer_id) for peer in state.peers if peer.online])
        try:
            await self._rooms.ask(state, self._nodes.state.p2p)
        except Exception as e:
            logger.warning("It could not be found out how much room the nodes have: %s", str(e) or type(e).__name__)

    async def generate(
        self, prompt: list[int], request: GenerationRequest, limit: int, cached: Callable[[int], None] = nobody_counts
    ) -> AsyncGenerator[int, None]:
        await self._check_reachable()
        guide = await self._constraints.guide(request.constraint, prompt)
        choose = sampler(request, self._model, prompt, limit, guide)
        known = list(prompt)
        session = self._blocks.open(len(prompt) + limit, prompt)
        self._running.add(session)
        tokens = self._decode.generate(session, prompt, choose=choose, limit=limit, ends=self.language.ends)
        try:
            async with contextlib.aclosing(tokens):
                async for token in tokens:
                    if len(known) == len(prompt):
                        cached(session.cached_tokens)
                    known.append(token)
                    yield token
        except Exception as e:
            raise self._told(e) from e
        finally:
            try:
                await session.close(known)
            finally:
                self._running.discard(session)

    async def embed(self, tokens: list[int]) -> list[float]:
        await self._check_reachable()
        session = self._blocks.open(len(tokens))
        self._running.add(session)
        try:
            return await self._decode.mean_state(session, tokens)
        except Exception as e:
            raise self._told(e) from e
        finally:
            try:
                await session.close()
            finally:
                self._running.discard(session)

    async def _check_reachable(self) -> None:
        """Raises SwarmUnavailable if it is known that blocks are missing, or that the way into the swarm is lost."""
        if self._lost is not None:
            raise SwarmOutOfReach(self._lost)
        if self._state.missing_blocks:
            await self._look()
            if self._state.missing_blocks:
                raise SwarmUnavailable(self._state.missing_blocks)

    def _told(self, error: Exception) -> Exception:
        """What a session ended by, as the user is told of it; what no swarm causes stays as it is."""
        match error:
            case NodeFull():
                return SwarmFull(error.sentence)
            case NodeRefused():
                return SwarmRefused(error.sentence)
            case MissingBlocksError() | BlocksLost():
                return SwarmUnavailable(error.block_indices)
            case LookUpFailed() | P2PDaemonLost():
                return SwarmOutOfReach(self._lost or str(error))
            case P2PHandlerError():
                return SwarmFailed(f"{printable(str(error))}.")
            case TimeoutError() | ConnectionError() | P2PDaemonError():
                return SwarmUnavailable(())
        return error

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
            self._poller = None
        await asyncio.gather(*(session.close() for session in self._running))
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        self._compute.stop()
        self._nodes.shutdown()
        self._dht.shutdown()


def _told_of(peer: PeerState) -> PeerStatus:
    return PeerStatus(
        peer.peer_id,
        peer.start,
        peer.end,
        peer.name,
        throughput=peer.throughput,
        cache_tokens_left=peer.cache_tokens_left,
        relayed=peer.relayed,
    )


def _nodes_of(source: ModelSource, dht: DHT) -> RemoteSequenceManager:
    """Who serves which blocks, kept up to date as soon as somebody asks for a route."""
    config: Any = AutoDistributedConfig.of(
        source, dht_prefix=source.swarm_name, initial_peers=(), max_retries=_MAX_RETRIES, show_route=False
    )
    uids = [f"{config.dht_prefix}{UID_DELIMITER}{block}" for block in range(source.num_blocks)]
    return RemoteSequenceManager(config, uids, dht=dht)
