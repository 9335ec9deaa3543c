"""Petals' RPCs, as its clients and other servers call them, answered by a BlockService.

Knows the messages, their metadata, and how sessions of several servers pass their outputs on. Does not know how blocks are computed.
Patched petals imports this module, which therefore imports nothing of petals.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, AsyncIterator  # noqa: UP035  (hivemind tells streams by typing's name)

import torch
from hivemind import BatchTensorDescriptor, MSGPackSerializer
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from petals_win.errors import NodeRefused, printable
from petals_win.node import wire
from petals_win.node.inbox import Inbox
from petals_win.node.lines import ServedLines
from petals_win.node.pushes import Pushes
from petals_win.node.served import ServedSession
from petals_win.node.service import BlockService, prompts_of_blocks
from petals_win.node.wire import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID, WireTensor
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.swarm.lines import NAME, Lines
from petals_win.swarm.protocol import CACHED_PAGES, LINE, OUTPUTS, PAGES, PROTOCOL, START, TAKES_BACK, mismatch

logger = logging.getLogger(__name__)

# By this name a node tells how many tokens one conversation may have there, prompt and answer together.
SESSION_TOKENS = "session_tokens"

_Incoming = tuple[str, dict[str, Any], Sequence[WireTensor]]  # uid, metadata, tensors

_REMOVE_SECONDS = 10.0  # until the daemon has taken note that these RPCs are served no more


@dataclass(frozen=True)
class Served:
    """What is served, as it is told to others."""

    name: str  # of the model, as upstream's servers call it
    content_id: str | None
    version: str  # of Petals
    start: int
    end: int
    compression: int = 0  # of answers, unless the request says otherwise


@dataclass(frozen=True)
class Deadlines:
    """In seconds."""

    request: float = 180.0  # a forward or backward pass; a push
    session: float = 1800.0  # after which a session takes no further step
    step: float = 300.0  # that a session waits for the next request


@dataclass
class _Request:
    """A request as far as all RPCs have it in common."""

    start: int
    end: int
    metadata: dict[str, Any]
    adapter: str
    tensors: list[WireTensor] = field(repr=False)


class TransformerConnectionHandler(ServicerBase):
    """hivemind names RPCs on the wire by their class, hence this name: Petals' own."""

    def __init__(self, service: BlockService, served: Served, deadlines: Deadlines):
        self._service, self._served, self._deadlines = service, served, deadlines
        names = [name for name in (served.name, served.content_id) if name is not None]
        self._blocks = {f"{name}.{block}": block for name in names for block in range(served.start, served.end)}
        self._inboxes: dict[object, Inbox[ExpertRequest]] = {}  # of all open sessions, by their ids if they have one
        self._lines, self._onward = ServedLines(self._take), Lines(self._open_line)
        self._dht: Any = None
        self._p2p: P2P | None = None

    def start(self, dht: Any) -> None:
        """Answer from now on, on the DHT's event loop. Blocks until peers can call."""

        async def register(dht: Any, _node: object) -> None:
            self._p2p = p2p = await dht.replicate_p2p()
            await self.add_p2p_handlers(p2p, balanced=True)
            await p2p.add_binary_stream_handler(NAME, self._lines.serve, balanced=True)

        self._dht = dht
        dht.run_coroutine(register)

    def stop(self) -> None:
        """Answer no more, so that peers get an error at once instead of waiting. Does nothing a second time."""
        p2p, self._p2p = self._p2p, None
        if p2p is not None and self._dht.is_alive():
            self._dht.call(self._leave(p2p), _REMOVE_SECONDS)

    async def _leave(self, p2p: Any) -> None:
        try:
            await self.remove_p2p_handlers(p2p)
            await p2p.remove_binary_stream_handler(NAME)
        finally:
            self._lines.close()
            self._onward.close()
            self._service.close()
            # Who says nothing for minutes would keep the blocks in memory for so long.
            for inbox in self._inboxes.values():
                inbox.end()

    def wait_for_sessions(self) -> None:
        """After `stop` and the end of the compute thread: until no session refers to the blocks any more."""
        if self._dht.is_alive() and not self._dht.call(self._without_sessions()):
            logger.warning("Sessions of clients that do not listen still have the blocks that have left the swarm")

    async def _without_sessions(self) -> bool:
        ends = time.monotonic() + _REMOVE_SECONDS
        while self._inboxes and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        return not self._inboxes

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        """What a client must know to call this node, and, if it names a block, the block."""
        if request.uid:
            self._range(request.uid)
        info = self._service.info()
        answer = {
            "version": self._served.version,
            "protocol": PROTOCOL,
            "content_id": self._served.content_id,
            "dht_client_mode": self._dht.client_mode,
            "cache_tokens_available": info.tokens_left,
        }
        if request.uid:
            hidden = BatchTensorDescriptor(1, 2048, info.width, dtype=info.dtype, compression=self._served.compression)
            prompts = BatchTensorDescriptor((), dtype=info.dtype)
            hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
            answer |= {
                SESSION_TOKENS: info.session_tokens,
                "forward_schema": ((hidden,), {}),
                "outputs_schema": (hidden,),
                "keyword_names": (),
                "inference_schema": ((hidden, prompts, hypo_ids), {}),
            }
        return ExpertInfo(serialized_info=MSGPackSerializer.dumps(answer))

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        """Hidden states, and deep prompts if there are any, to hidden states."""
        return ExpertResponse(tensors=await self._forward("rpc_forward", _whole(request), context))

    async def rpc_forward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        """As rpc_forward, for tensors larger than a message."""
        for part in wire.pieces(await self._forward("rpc_forward_stream", self._pieces(requests), context)):
            yield part

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        """Hidden states, gradients of the outputs, and deep prompts if there are any, to gradients of the inputs and prompts."""
        return ExpertResponse(tensors=await self._backward("rpc_backward", _whole(request), context))

    async def rpc_backward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        """As rpc_backward, for tensors larger than a message."""
        for part in wire.pieces(await self._backward("rpc_backward_stream", self._pieces(requests), context)):
            yield part

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        """Take the outputs of the blocks before, sent by their server, for a session that is open here.

        It is known by its session alone: the node that pushes may call the blocks otherwise.
        """
        session_id = wire.read_metadata(request).get("session_id")
        _note(logging.DEBUG, "rpc_push", _blocks_in(request.uid), context.remote_id)
        inbox = self._inboxes.get(session_id) if isinstance(session_id, str) else None
        if inbox is None or not inbox.push(request):
            logger.debug("A push came for the session %.40r, which does not take it", session_id)
        return ExpertResponse()

    def _take(self, session_id: str, request: ExpertRequest, sender: PeerID) -> bool:
        """A step on a line, from the client or from the server of the blocks before; False if there is no session that takes it."""
        if logger.isEnabledFor(logging.DEBUG):
            _note(logging.DEBUG, "line", _blocks_in(request.uid), sender)
        inbox = self._inboxes.get(session_id)
        return inbox is not None and inbox.push(request)

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        """A session: one answer to each step, in the order of the requests, until the client has no more of them.

        A step may come twice, from the client and from the server of the blocks before; whichever is first is taken.
        """
        ends = time.monotonic() + self._deadlines.session
        first = await self._first(requests)
        if first is None or not first.tensors:
            return
        opening = self._request(first.uid, wire.read_metadata(first), first.tensors)
        blocks = f"{opening.start}:{opening.end}"
        session = self._open(opening, str(context.remote_id))
        pushes = Pushes(self._stub_of, self._onward.to, self._served.name, self._deadlines.request)
        _note(logging.INFO, "rpc_inference.open", blocks, context.remote_id)
        about: dict[str, Any] = {TAKES_BACK: session.takes_back}  # with the first answer
        try:
            async with Inbox(first, requests) as inbox:
                with self._reachable(opening.metadata, inbox):
                    while True:
                        try:
                            request = await inbox.next(min(ends - time.monotonic(), self._deadlines.step))
                        except TimeoutError:
                            _note(logging.WARNING, "rpc_inference.step", blocks, context.remote_id, "timed out")
                            break
                        if request is None or not request.tensors:
                            if request is not None:
                                # Before the client learns of the end, and perhaps goes on from there in its next session.
                                await session.close(_pages(session, wire.read_metadata(request)))
                            break
                        metadata = wire.read_metadata(request)
                        if not inbox.is_new(metadata.get("step_id")):
                            continue
                        _truncate(session, metadata)
                        if pages := _pages(session, metadata):
                            about[CACHED_PAGES] = await session.recall(pages)
                        structure = metadata.get("args_structure", opening.metadata.get("args_structure"))
                        hidden, may_push = await self._step(
                            session, opening, wire.arguments(request.tensors, structure)
                        )
                        wanted = _wanted(opening, metadata, hidden)
                        output = self._output(wanted)
                        if may_push and metadata.get("next_servers"):
                            whole = output if wanted is hidden else self._output(hidden)
                            pushes.push(whole, request, metadata)
                        told, about = MSGPackSerializer.dumps(about) if about else b"", {}
                        answer = ExpertResponse(tensors=[output], metadata=told)
                        to = context.remote_id, metadata.get(LINE), opening.metadata.get("session_id")
                        if not await self._lines.answer(*to, answer):
                            yield answer
        finally:
            session.close()
            pushes.close()
            _note(logging.INFO, "rpc_inference.close", blocks, context.remote_id)

    def _stub_of(self, peer: PeerID) -> Any:
        if self._p2p is None:
            raise RuntimeError("These blocks are served no longer")
        return self.get_stub(self._p2p, peer)

    async def _open_line(self, peer: PeerID) -> Any:
        if self._p2p is None:
            raise ConnectionError("These blocks are served no longer")
        return await self._p2p.call_binary_stream_handler(peer, NAME)

    async def _first(self, requests: AsyncIterator[ExpertRequest]) -> ExpertRequest | None:
        try:
            async with asyncio.timeout(self._deadlines.step):
                return await anext(requests, None)
        except TimeoutError:
            return None

    def _open(self, opening: _Request, owner: str) -> ServedSession:
        metadata = opening.metadata
        max_length, patience = metadata.get("max_length"), metadata.get("alloc_timeout", 0.0)
        if type(max_length) is not int:
            raise NodeRefused(f"A session needs max_length, a number of tokens, not {max_length!r:.40}.")
        if not isinstance(patience, int | float) or not 0 <= patience < math.inf:
            raise NodeRefused(f"The alloc_timeout of a session is a number of seconds, not {patience!r:.40}.")
        hidden, *_ = wire.arguments(opening.tensors, metadata.get("args_structure")) or [None]
        size = () if hidden is None else hidden.size
        return self._service.open(
            opening.start,
            opening.end,
            batch_size=size[0] if size else 0,
            max_length=max_length,
            adapter=opening.adapter,
            patience=float(patience),
            owner=owner,
        )

    @contextmanager
    def _reachable(self, metadata: dict[str, Any], inbox: Inbox[ExpertRequest]) -> Iterator[None]:
        """Meanwhile other servers can push to the session, if it has an id."""
        session_id = metadata.get("session_id")
        key = session_id if isinstance(session_id, str) else object()
        if key in self._inboxes:
            raise ValueError("A session of this id is open already")
        self._inboxes[key] = inbox
        try:
            yield
        finally:
            del self._inboxes[key]

    async def _step(
        self, session: ServedSession, opening: _Request, tensors: Sequence[WireTensor]
    ) -> tuple[torch.Tensor, bool]:
        """The outputs, and whether the next server may have them from here: deep prompts are of one server's blocks alone."""
        session.check_step(tensors[0].size if tensors else ())  # before its bytes become a tensor
        prompts = prompts_of_blocks(wire.read_optional(tensors, 1), opening.end - opening.start)
        hypo_ids = wire.read_optional(tensors, 2)
        hidden = await session.step(wire.read_tensor(tensors[0]), prompts=prompts, hypo_ids=hypo_ids)
        return hidden, prompts is None

    async def _forward(self, method: str, incoming: Awaitable[_Incoming], context: P2PContext) -> list[WireTensor]:
        async with asyncio.timeout(self._deadlines.request):
            request = self._request(*await incoming)
            _note(logging.INFO, method, f"{request.start}:{request.end}", context.remote_id)
            (hidden,), prompts = self._inputs(request, 1)
            kinds = self._kinds(request.metadata, 1)
            how = {"prompts": prompts, "adapter": request.adapter}
            output = await self._service.forward(hidden, request.start, request.end, **how)
            return self._write([output], kinds)

    async def _backward(self, method: str, incoming: Awaitable[_Incoming], context: P2PContext) -> list[WireTensor]:
        async with asyncio.timeout(self._deadlines.request):
            request = self._request(*await incoming)
            _note(logging.INFO, method, f"{request.start}:{request.end}", context.remote_id)
            (hidden, grad_out), prompts = self._inputs(request, 2)
            kinds = self._kinds(request.metadata, 1 if prompts is None else 2)
            how = {"prompts": prompts, "adapter": request.adapter}
            grads = await self._service.backward(hidden, grad_out, request.start, request.end, **how)
            return self._write(grads, kinds)

    async def _pieces(self, requests: AsyncIterator[ExpertRequest]) -> _Incoming:
        served, service = self._served, self._service
        blocks = served.end - served.start
        return await wire.gather(requests, wire.most_bytes(service.request_tokens, service.span.row.width, blocks))

    def _request(self, uid: str, metadata: dict[str, Any], tensors: Sequence[WireTensor]) -> _Request:
        """Raises ValueError for what another node may do, NodeRefused for what none will."""
        start, end = self._range(uid)
        reason = mismatch(metadata.get("protocol"), "This client")
        if reason is not None:
            raise ValueError(reason)
        adapter = metadata.get("active_adapter") or ""
        if not isinstance(adapter, str):
            raise NodeRefused("The name of an adapter is a text.")
        return _Request(start, end, metadata, adapter, list(tensors))

    def _range(self, uid: str) -> tuple[int, int]:
        names = uid.split(" ")
        blocks = [self._blocks.get(name) for name in names]
        if None in blocks:
            raise ValueError(f"This node does not serve {printable(names[blocks.index(None)])}")
        start, end = blocks[0] or 0, (blocks[-1] or 0) + 1
        if blocks != list(range(start, end)):
            raise NodeRefused("The blocks of one request must follow one another")
        return start, end

    def _inputs(self, request: _Request, count: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The first `count` tensors, of the shape of hidden states, and the deep prompts."""
        tensors = wire.arguments(request.tensors, request.metadata.get("args_structure"))
        for tensor in tensors[:count]:
            self._service.check_hidden(tensor.size)
        if len(tensors) < count:
            raise NodeRefused(f"The request has {len(tensors)} tensors, and needs {count}.")
        return [wire.read_tensor(tensor) for tensor in tensors[:count]], wire.read_optional(tensors, count)

    def _kinds(self, metadata: dict[str, Any], count: int) -> list[int]:
        """In which compression so many tensors of the answer are to travel."""
        asked = metadata.get("output_compression")
        if asked is None:
            return [self._served.compression] * count
        if not isinstance(asked, list | tuple) or len(asked) != count:
            raise NodeRefused(f"The output_compression of {count} tensors is not {asked!r:.40}.")
        for kind in asked:
            if type(kind) is not int or kind not in wire.COMPRESSIONS:
                raise NodeRefused(f"There is no output_compression {kind!r:.40}.")
        return list(asked)

    def _output(self, hidden: torch.Tensor) -> WireTensor:
        (output,) = self._write([hidden], [self._served.compression])
        return output

    def _write(self, tensors: list[torch.Tensor], kinds: list[int]) -> list[WireTensor]:
        dtype = self._service.span.dtype
        return [wire.write_tensor(tensor.to(dtype), kind) for tensor, kind in zip(tensors, kinds, strict=True)]


def _truncate(session: ServedSession, metadata: dict[str, Any]) -> None:
    """Take back the tokens that the session is not to keep before a step."""
    start = metadata.get(START)
    if start is None:
        return
    if type(start) is not int:
        raise NodeRefused(f"The {START} of a step is a number of tokens, not {start!r:.40}.")
    session.truncate(start)


def _wanted(opening: _Request, metadata: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """Those of a step's outputs [batch, tokens, hidden] that its client wants: `hidden` itself, or a copy of its last tokens."""
    counts, tokens = metadata.get(OUTPUTS, {}), hidden.shape[1]
    session_id = str(opening.metadata.get("session_id"))
    count = counts.get(session_id, tokens) if isinstance(counts, dict) else None
    if type(count) is not int or not 0 <= count <= tokens:
        raise NodeRefused(
            f"The {OUTPUTS} of a step are, for each session, a number from 0 to {tokens:,}, not {counts!r:.80}."
        )
    return hidden if count == tokens else hidden[:, tokens - count :].clone()


def _pages(session: ServedSession, metadata: dict[str, Any]) -> list[bytes]:
    """The hashes of the session's pages, if a message names them. Raises NodeRefused for more of them than it can have."""
    pages = metadata.get(PAGES)
    if pages is None:
        return []
    if not isinstance(pages, list) or len(pages) > session.longest // PAGE_TOKENS:
        raise NodeRefused("The pages of a session are a list of no more than it can have.")
    if not all(isinstance(page, bytes) and 16 <= len(page) <= 64 for page in pages) or len(set(pages)) < len(pages):
        raise NodeRefused("The pages of a session are different hashes of 16 to 64 bytes.")
    return pages


async def _whole(request: ExpertRequest) -> _Incoming:
    return request.uid, wire.read_metadata(request), request.tensors


def _blocks_in(uid: str) -> str:
    """The blocks that a request speaks of, by whatever name, for a line of the log."""
    blocks = [int(block) for name in uid.split(" ") if (block := name.rpartition(".")[2]).isdecimal()]
    return f"{min(blocks)}:{max(blocks) + 1}" if blocks else printable(uid)


def _note(level: int, method: str, blocks: str, peer: PeerID, what: str = "") -> None:
    logger.log(level, "%s(blocks=%s, remote_peer=...%s)%s", method, blocks, str(peer)[-6:], what and f": {what}")
