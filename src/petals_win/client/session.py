"""A session through all blocks of a model, on the nodes of a swarm: steps, their replay elsewhere, waiting for room, giving up.

Knows what a step has to pass and in which order, and the kinds of a node's errors. Does not know how a message looks, nor how a
route is found.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch
from hivemind import PeerID
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2PHandlerError

from petals_win.client.history import Track
from petals_win.client.pages import page_hashes
from petals_win.client.pieces import chunk_end, chunk_tokens, may_be_pushed
from petals_win.client.routes import NodeFailure, Routes
from petals_win.client.server_session import NodeSilent, ServerSession
from petals_win.errors import NodeFull, NodeRefused, node_error
from petals_win.host.futures import AwaitableFuture
from petals_win.span.prefixes import PAGE_TOKENS

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0  # that a step waits in all until full nodes have room
_PATIENCE_WITH_PLACES = 20.0  # while the session holds places at nodes behind the full one
_LONGEST_PAUSE = 15.0  # between two tries to find room
_IN_FLIGHT = 2  # chunks at one node, so that it has the next one when it is through with one


class RemoteSession:
    """A conversation of up to `max_length` tokens, or a batch of equally long ones. One step at a time.

    Nothing is sent before the first step. All work is done on the event loop of hivemind's client calls; whoever steps may be
    on any other one.
    """

    def __init__(self, routes: Routes, max_length: int, tokens: Sequence[int] = ()):
        """`tokens`: the ids that the first step will be of, as far as nodes may be asked for what they have kept of them."""
        self._routes, self._max_length = routes, max_length
        self._prompt = tokens
        self._cached_tokens = 0
        self._num_blocks = routes.num_blocks
        self._position = 0
        self._first_prompts: torch.Tensor | None = None
        # In the order of their blocks; only in the middle of a step some are missing.
        self._servers: list[ServerSession] = []
        self._tracks = {0: Track()}  # by the block that they lead into
        self._stepping: asyncio.Task[Any] | None = None
        self._closed = False

    @property
    def position(self) -> int:
        """How many tokens the session has seen."""
        return self._position

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the first step were not computed, since the nodes had kept what earlier sessions made of them."""
        return self._cached_tokens

    @property
    def takes_back(self) -> int:
        """How many of its last tokens all nodes can forget; 0 if one cannot, and before the first step."""
        return min((server.takes_back for server in self._servers), default=0)

    @property
    def route(self) -> list[tuple[PeerID, int, int]]:
        """Each node and its blocks [start, end)."""
        return [(server.peer_id, server.start, server.end) for server in self._servers]

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] through all blocks; returns the same shape, on the same device.

        Of the first step of a session that was opened with token ids, only the last tokens are returned, at least one: those
        that were computed. With `last`, no more than so many of the last tokens are returned of any step, and a node of ours
        sends no others.

        A node that fails is replaced by another one, which gets the whole past, up to `max_retries` times in a row with growing
        pauses. Where one has no room, all of them get theirs back, and the step waits for its turn. Raises NodeFull if that takes
        too long, NodeRefused for what a node will not do, and in the end BlocksLost, or what the last node failed of. Cancelling the
        task that waits ends the session.

        :param prompts: deep prompts [blocks, batch or 1, prefix, hidden], at the first step only
        :param hypo_ids: int64 [batch]: row i goes on from what was row hypo_ids[i]
        :param last: at least 1; None for all tokens
        """
        return await self.submit(hidden, prompts=prompts, hypo_ids=hypo_ids, last=last)

    def submit(
        self,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        last: int | None = None,
    ) -> AwaitableFuture[torch.Tensor]:
        """As `step`, for a thread without an event loop: the future can also be waited for, and cancelled."""
        self._check(hidden, prompts, hypo_ids)
        if last is not None and last < 1:
            raise ValueError(f"At least one token is returned, not {last}")
        return RemoteExpertWorker.run_coroutine(
            self._step(
                hidden.detach().cpu(),
                None if prompts is None else prompts.detach().cpu(),
                None if hypo_ids is None else hypo_ids.cpu(),
                hidden.shape[1] if last is None else last,
                like=hidden,
            ),
            return_future=True,
        )

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on, between two steps; at least one token is kept.

        The nodes hear of it with the next step. One that cannot take tokens back (upstream's cannot) gets the past anew then.
        Raises ValueError for a position that the session has not reached.
        """
        kept = 1 if self._first_prompts is None else self._first_prompts.shape[2]
        if not kept <= position <= self._position:
            raise ValueError(f"Of {self._position} tokens {position} cannot be kept")
        if self._stepping is not None:
            raise RuntimeError("The session is in the middle of a step")
        self._position = position

    async def close(self, tokens: Sequence[int] = ()) -> None:
        """Give back what the nodes hold; a step in work ends. Takes at most 3 s. Closing twice is allowed.

        `tokens`: the ids of what the session has seen, as far as later ones may go on from it.
        """
        await self.submit_close(tokens)

    def submit_close(self, tokens: Sequence[int] = ()) -> AwaitableFuture[None]:
        """As `close`, for a thread without an event loop."""
        return RemoteExpertWorker.run_coroutine(self._close(tokens), return_future=True)

    def _check(self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None) -> None:
        if self._closed:
            raise RuntimeError("The session is closed")
        if hidden.ndim != 3 or hidden.shape[1] == 0:
            raise ValueError(f"Hidden states must be [batch, tokens, hidden], not {list(hidden.shape)}")
        batch_size, new, hidden_size = hidden.shape
        if self._position + new > self._max_length:
            raise ValueError(
                f"The session holds {self._max_length} tokens, {self._position} are used, and {new} more came"
            )
        if prompts is not None:
            if self._position:
                raise ValueError("Deep prompts belong to the first step of a session")
            blocks, rows, length, size = prompts.shape
            if blocks != self._num_blocks or rows not in (1, batch_size) or length > new or size != hidden_size:
                raise ValueError(
                    f"Deep prompts {list(prompts.shape)} do not fit {list(hidden.shape)} in {self._num_blocks} blocks"
                )
        if hypo_ids is not None:
            if hypo_ids.shape != (batch_size,) or hypo_ids.dtype != torch.int64:
                raise ValueError(f"hypo_ids must be {batch_size} int64 values")
            if not 0 <= int(hypo_ids.min()) <= int(hypo_ids.max()) < batch_size:
                raise ValueError(f"hypo_ids must be rows from 0 to {batch_size - 1}, not {hypo_ids.tolist()}")

    # What follows runs on the client's event loop.

    async def _step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        hypo_ids: torch.Tensor | None,
        last: int,
        *,
        like: torch.Tensor,
    ) -> torch.Tensor:
        if self._closed:
            raise RuntimeError("The session is closed")
        if self._stepping is not None:
            raise RuntimeError("The session is in the middle of another step")
        self._stepping = asyncio.current_task()
        before, done = self._tracks[0], False
        try:
            if self._position == 0:
                self._first_prompts = prompts
            self._take_back()
            before = self._tracks[0].copy()
            for server in self._servers:
                server.hypo_ids = hypo_ids
            if hypo_ids is not None:
                for track in self._tracks.values():
                    track.reorder(hypo_ids)
            self._tracks[0].add(self._position, hidden)
            output = await _Step(self, hidden, last).run()
            self._position += hidden.shape[1]
            done = True
            return output.to(device=like.device, dtype=like.dtype)
        except asyncio.CancelledError:
            self._closed = True
            raise
        finally:
            self._stepping = None
            if not done:  # another one may be tried
                self._abort()
                self._tracks = {0: before}

    def _take_back(self) -> None:
        """What `truncate` has said since the last step."""
        for server in self._servers:
            if server.sent > self._position and not server.truncate(self._position):
                server.abort()
        self._servers = [server for server in self._servers if not server.closed]
        if any(track.begin > self._position for track in self._tracks.values()):  # within what the nodes had kept
            self._abort()
            self._tracks = {0: self._tracks[0]}
        for track in self._tracks.values():
            track.truncate(self._position)

    def _pages(self, tokens: Sequence[int]) -> list[bytes]:
        """The hashes of these tokens' pages; none where other things than tokens play a part."""
        return [] if self._first_prompts is not None else page_hashes(tokens, self._routes.about)

    async def _close(self, tokens: Sequence[int]) -> None:
        self._closed = True
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait({self._stepping})
        await self._give_back(self._pages(tokens[: self._position]))

    async def _give_back(self, pages: Sequence[bytes] = ()) -> None:
        """End the sessions at all nodes in order."""
        servers, self._servers = self._servers, []
        self._routes.left.add(pages)
        await asyncio.gather(*(server.close(pages) for server in servers))

    def _abort(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.abort()


class _Step:
    """One step of a session, through as many nodes and failures as it takes."""

    def __init__(self, session: RemoteSession, hidden: torch.Tensor, last: int):
        self._session, self._routes = session, session._routes
        self._hidden, self._id = hidden, str(uuid4())
        self._begin, self._end = session._position, session._position + hidden.shape[1]
        self._wanted_from = max(self._begin, self._end - last)
        self._output = Track(self._wanted_from)
        self._size = 0
        self._deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        self._furthest: dict[int, int] = {}  # tokens by block: how many have ever come there
        self._silent: set[PeerID] = set()  # nodes that were given up because they said nothing
        self._further = False  # whether more have come since the last failure
        self._progress = asyncio.Condition()

    async def run(self) -> torch.Tensor:
        """The hidden states after the last block, of the tokens that are wanted. Raises as RemoteSession.step."""
        session, routes = self._session, self._routes
        failures = fulls = 0
        told: Exception | None = None
        while (failure := await self._attempt()) is not None:
            cause = failure.cause
            refusal = node_error(str(cause))
            if isinstance(refusal, NodeRefused):
                raise refusal from cause
            if isinstance(refusal, NodeFull):
                pause = min(2**fulls, _LONGEST_PAUSE)
                if self._patience <= pause:
                    raise refusal from cause
                logger.debug("No room at a node, starting over in %.0f s: %s", pause, refusal.sentence)
                await session._give_back()
                session._tracks = {0: session._tracks[0]}
                fulls, failures = fulls + 1, 0
                await asyncio.sleep(pause)
                continue
            if failure.peer_id is not None and isinstance(cause, NodeSilent):
                self._silent.add(failure.peer_id)
            self._drop(failure)
            routes.failed(failure)
            failures = 1 if self._further else failures + 1
            told = cause if isinstance(cause, P2PHandlerError) else told
            if failures == routes.max_attempts:
                # That no node is left now says less than what the last one said.
                raise (told or cause) if failure.peer_id is None else failure.told_or_lost()
            # For who was silent has been waited already.
            pause = 0.0 if isinstance(cause, NodeSilent) else routes.pause(failures)
            logger.warning("A step failed at %s, trying again in %.0f s: %r", failure, pause, cause)
            logger.debug("It failed here:", exc_info=cause)
            await asyncio.sleep(pause)
        for server in session._servers:
            routes.succeeded(server.peer_id)
        self._silent.clear()  # its sessions go on, and may be waited for in other steps
        return self._output.between(self._output.begin, self._end)

    async def _attempt(self) -> NodeFailure | None:
        """Pass as many nodes as possible. Returns what failed, None if nothing did."""
        self._further = False
        try:
            await self._complete_the_route()
            await self._pass_the_nodes()
        except NodeFailure as failure:
            return failure
        return None

    @property
    def _patience(self) -> float:
        return max(self._deadline - asyncio.get_running_loop().time(), 0.0)

    def _drop(self, failure: NodeFailure) -> None:
        for server in self._session._servers:
            if server.start == failure.blocks[0] and server.peer_id == failure.peer_id:
                server.abort()
                self._session._servers.remove(server)
                break

    async def _complete_the_route(self) -> None:
        """Open sessions for the blocks that have none, each of which gets the past from the track before it.

        Behind the first node nothing is known of tokens that nodes had kept: then all nodes are sent everything.
        """
        session = self._session
        while True:
            await self._fill_the_gaps()
            lost = [server for server in session._servers if session._tracks[server.start].begin > server.sent]
            if not lost:
                break
            await session._give_back()
            session._tracks = {0: session._tracks[0]}
        if session._position == 0 and not any(server.sent for server in session._servers):
            await self._recall()

    async def _recall(self) -> None:
        """Begin with what all nodes have kept of the session's tokens. They are asked in the order of their blocks, as for places."""
        session, hidden = self._session, self._hidden
        servers = session._servers
        prompt = session._prompt[:-1] if hidden.shape[:2] == (1, len(session._prompt)) else ()
        pages = self._routes.left.among(session._pages(prompt)) if all(server.remembers for server in servers) else []
        session._cached_tokens = 0
        for server in servers if pages else ():
            try:
                step_id = f"{self._id}/pages/{server.start}"
                count = await server.recall(pages, hidden[:, :0], step_id=step_id, patience=self._patience)
            except Exception as e:
                # The nodes before it go on from what they have kept, which is not known here: they begin anew, too.
                session._servers = [other for other in servers if not other.sent]
                for other in servers:
                    if other.sent:
                        other.abort()
                raise NodeFailure(server.peer_id, (server.start, server.end), e) from e
            pages = pages[:count]
            if not pages:
                break
        kept = PAGE_TOKENS * len(pages)
        if any(server.sent > kept and not server.truncate(kept) for server in servers):
            # It has kept much more than another one has, and cannot go back so far: all compute the whole prompt.
            session._prompt = ()
            await session._give_back()
            await self._complete_the_route()
            return
        session._cached_tokens = kept
        session._tracks = {0: session._tracks[0], **{s.start: Track(kept) for s in servers if s.start}}
        self._output = Track(max(kept, self._wanted_from))

    async def _fill_the_gaps(self) -> None:
        session = self._session
        while (gap := self._first_gap()) is not None:
            opened = await self._routes.open(*gap, session._max_length, self._silent)
            session._servers = sorted([*session._servers, *opened], key=lambda server: server.start)
        session._tracks = {server.start: session._tracks.get(server.start) or Track() for server in session._servers}
        self._size = self._size or chunk_tokens(self._hidden, len(session._servers))

    def _first_gap(self) -> tuple[int, int] | None:
        block = 0
        for server in self._session._servers:
            if server.start > block:
                return block, server.start
            block = server.end
        return (block, self._session._num_blocks) if block < self._session._num_blocks else None

    async def _pass_the_nodes(self) -> None:
        """Send each node what it lacks, in chunks, as soon as the node before has answered it."""
        servers = self._session._servers
        if all(self._chunk_end(server) == self._end for server in servers):
            for number in range(len(servers)):
                await self._send(number)
                await self._receive(number)
            return
        passing = [asyncio.create_task(do(n)) for n in range(len(servers)) for do in (self._send, self._receive)]
        try:
            await asyncio.wait(passing, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for each in passing:
                each.cancel()
            results = await asyncio.gather(*passing, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _chunk_end(self, server: ServerSession) -> int:
        prompts = self._session._first_prompts
        at_least = 0 if prompts is None else prompts.shape[2]
        return chunk_end(server.sent, self._begin, self._end, self._size, at_least)

    async def _send(self, number: int) -> None:
        session = self._session
        server = session._servers[number]
        track = session._tracks[server.start]
        while server.sent < self._end:
            end = self._chunk_end(server)
            await self._until(lambda end=end: track.length >= end and server.in_flight < _IN_FLIGHT)
            chunk = track.between(server.sent, end)
            behind = self._behind(number, end, chunk)
            server.send(
                chunk,
                session._first_prompts if server.sent == 0 else None,
                step_id=f"{self._id}/{server.sent}",
                patience=self._patience_at(number),
                push_to=behind,
                outputs=self._outputs([server, *behind], end, chunk.shape[1]),
                whole=(server.sent, end) == (self._begin, self._end),
            )
            await self._notify()

    async def _receive(self, number: int) -> None:
        session = self._session
        server = session._servers[number]
        track = self._track_behind(server)
        while server.answered < self._end:
            await self._until(lambda: server.in_flight > 0)
            try:
                start, output = await server.answer()
            except Exception as e:
                raise NodeFailure(server.peer_id, (server.start, server.end), e) from e
            if start + output.shape[1] > track.begin:
                track.add(max(start, track.begin), output[:, max(track.begin - start, 0) :])
            if server.answered > self._furthest.get(server.end, 0):
                self._furthest[server.end], self._further = server.answered, True
            await self._notify()

    def _track_behind(self, server: ServerSession) -> Track:
        """What the node's answers go into."""
        session = self._session
        return session._tracks[server.end] if server.end < session._num_blocks else self._output

    def _outputs(self, servers: Sequence[ServerSession], end: int, tokens: int) -> dict[str, int]:
        """How many of the last outputs are wanted of a chunk of so many tokens up to `end`, by session, where it is not all.

        What is known already is not: that of a past which a node gets anew, and of a prompt all but the last.
        """
        wanted = {server.session_id: max(end - self._track_behind(server).length, 0) for server in servers}
        return {session_id: count for session_id, count in wanted.items() if count < tokens}

    async def _until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            async with self._progress:
                await self._progress.wait_for(condition)

    async def _notify(self) -> None:
        async with self._progress:
            self._progress.notify_all()

    def _patience_at(self, number: int) -> float:
        """Seconds to wait for room at a new node. All sessions take their places in the order of the blocks, so that none waits
        for the other in a circle; one that has places behind a node that was replaced gives them up soon."""
        behind = any(later.sent for later in self._session._servers[number + 1 :])
        return min(self._patience, _PATIENCE_WITH_PLACES) if behind else self._patience

    def _behind(self, number: int, end: int, chunk: torch.Tensor) -> list[ServerSession]:
        """The sessions whose nodes may get this chunk straight from the ones before. Only a step of one chunk is pushed, and never the
        past: calls from node to node may overtake each other."""
        servers = self._session._servers
        whole = (servers[number].sent, end) == (self._begin, self._end)
        if not whole or not self._routes.pushes or not may_be_pushed(chunk):
            return []
        behind = []
        for later in servers[number + 1 :]:
            if later.sent != self._begin or later.keeps != servers[number].keeps:
                break
            behind.append(later)
        return behind


class SwarmBlocks:
    """All blocks of a model, on the nodes that `sequence_manager`, a petals RemoteSequenceManager, finds."""

    def __init__(self, sequence_manager: Any):
        self.routes = Routes(sequence_manager)

    def open(self, max_length: int, tokens: Sequence[int] = ()) -> RemoteSession:
        """A session of at most `max_length` tokens, the first of which are `tokens`. Sends nothing yet."""
        return RemoteSession(self.routes, max_length, tokens)
