"""Nodes of a made-up model in this process, behind the calls of hivemind's P2P, that do what a test's script says.

The real thing is in tests/e2e; here a node fails, hangs or is slow at the very chunk that a test means, and a log tells who did what when.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from hivemind import MSGPackSerializer, PeerID, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.swarm import lines
from petals_win.swarm.protocol import CACHED_PAGES, LINE, OUTPUTS, PAGES, START, TAKES_BACK

BLOCKS, HIDDEN = 4, 8
NONE, ExpertResponse = runtime_pb2.CompressionType.NONE, runtime_pb2.ExpertResponse


class Block:
    """Each token becomes what it was and a part of all before it, in its row, so that a lost or doubled token is seen."""

    def __init__(self, number: int):
        self.number, self.past = number, torch.zeros(0)  # sums [rows, tokens + 1, hidden]

    def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        hypo_ids: torch.Tensor | None,
        start: int | None = None,
    ) -> torch.Tensor:
        if self.past.numel() == 0:
            self.past = torch.zeros(len(hidden), 1, HIDDEN, dtype=torch.float64)
        if start is not None:
            assert start < self.past.shape[1]
            self.past = self.past[:, : start + 1]
        if hypo_ids is not None:
            self.past = self.past[hypo_ids]
        hidden = hidden.to(torch.float64)
        if prompts is not None:
            hidden = hidden.clone()
            hidden[:, : prompts.shape[1]] += prompts
        sums = self.past[:, -1:] + hidden.cumsum(1)
        self.past = torch.cat([self.past, sums], dim=1)
        return (0.5 * hidden + 0.25 * sums + self.number).to(torch.float32)


def through(blocks: list[Block], hidden: torch.Tensor, prompts=None, hypo_ids=None, start=None) -> torch.Tensor:
    for number, block in enumerate(blocks):
        hidden = block.step(hidden, None if prompts is None else prompts[number], hypo_ids, start)
    return hidden


def blocks_of(start: int, end: int) -> Callable[..., torch.Tensor]:
    """A new session's blocks [start, end): (hidden, prompts of these blocks, hypo_ids, start) -> hidden."""
    blocks = [Block(number) for number in range(start, end)]

    return partial(through, blocks)


@dataclass
class Request:
    """One request of a session as its node sees it. `number` counts those of all of the node's sessions."""

    number: int
    tokens: int
    metadata: dict[str, Any]
    pushed: bool


async def _compute(_request: Request) -> None:
    """What a script says when it says nothing."""


@dataclass
class Node:
    """A node of the blocks [start, end). `script` is awaited before each request is computed."""

    name: str
    start: int
    end: int
    script: Callable[[Request], Awaitable[None]] = _compute
    answer_shape: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden
    alive: bool = True  # whether it answers rpc_info
    opens: bool = True  # whether it lets a session in
    takes_back: int | None = None  # tokens of a session; upstream's nodes do not say, and heed no request to
    cuts: bool = True  # whether it sends only the outputs that are wanted; upstream's nodes send all
    lines: bool = True  # whether short steps can go together; upstream's nodes know no lines
    # By the hash of a page: which one it is, and the state.
    kept: dict[bytes, tuple[int, list[Block]]] = field(default_factory=dict)
    says_of_pages: Any = None  # without having any
    peer_id: PeerID = field(init=False)
    requests: list[Request] = field(default_factory=list)
    pings: int = 0
    open: dict[str, asyncio.Queue] = field(default_factory=dict)
    streams: int = 0
    open_lines: dict[str, lines.Line] = field(default_factory=dict)  # its ends, by their names
    on_line: int = 0  # steps
    answered: list[int] = field(default_factory=list)  # bytes of each answer

    def __post_init__(self):
        self.peer_id = PeerID(self.name.encode())


class Swarm:
    """What Routes asks for: a sequence manager, and its P2P. Routes prefer the nodes that come first."""

    def __init__(self, *nodes: Node, max_retries: int | None = 3, request_timeout: float = 5.0):
        self.nodes = list(nodes)
        self.log: list[tuple[str, ...]] = []
        self.failures: list[str | None] = []
        self.config = SimpleNamespace(
            max_retries=max_retries, request_timeout=request_timeout, connect_timeout=1.0, use_server_to_server=True
        )
        self.avoided: set[PeerID] = set()
        self.state = SimpleNamespace(p2p=self, rpc_info=None, sequence_info=self, banned_peers=self.avoided)
        self._thread = SimpleNamespace(trigger=threading.Event())
        self.block_uids = tuple(f"model.{block}" for block in range(BLOCKS))
        self.look_up: Callable[[], None] = lambda: None
        self.serving: set[asyncio.Task[None]] = set()  # lines
        self.returns = False  # whether a node that is avoided is found again where it is the only one

    # The sequence manager.

    def __len__(self) -> int:
        return BLOCKS

    def make_sequence(self, start, end, *, mode, cache_tokens_needed):
        self.look_up()
        spans, block = [], start
        while block < end:
            found = self.spans_of(block)
            if not found:
                raise RuntimeError(f"Nobody holds the block {block}")
            ours = found[0].lines or found[0].takes_back is not None
            info = SimpleNamespace(content_id=None, protocol=1 if ours else None)
            spans.append(SimpleNamespace(peer_id=found[0].peer_id, start=block, end=found[0].end, server_info=info))
            block = found[0].end
        return spans

    def spans_of(self, block: int) -> list[Node]:
        return [n for n in self.nodes if n.start <= block < n.end and n.peer_id not in self.avoided]

    def get_retry_delay(self, attempt: int) -> float:
        return 0.0 if attempt == 0 else 0.01

    def get_request_metadata(self, protocol, *args, **kwargs):
        return {"protocol": 1, "active_adapter": None, "args_structure": None, "points": 0.0}

    def on_request_failure(self, peer_id) -> None:
        self.failures.append(None if peer_id is None else self._node(peer_id).name)
        self.avoided.add(peer_id)
        if not all(self.spans_containing_block):  # as the manager does: whoever is left is better than nobody
            if self.returns:
                self.avoided.clear()

    def on_request_success(self, peer_id) -> None:
        self.avoided.discard(peer_id)

    @property
    def spans_by_priority(self) -> list[Node]:
        return [node for node in self.nodes if node.peer_id not in self.avoided]

    @property
    def spans_containing_block(self) -> list[list[Node]]:
        return [self.spans_of(block) for block in range(BLOCKS)]

    # The P2P.

    def _node(self, peer_id) -> Node:
        return next(node for node in self.nodes if node.peer_id == peer_id)

    async def call_protobuf_handler(self, peer_id, name, request, answer_type):
        assert name == "TransformerConnectionHandler.rpc_info"
        node = self._node(peer_id)
        node.pings += 1
        if not node.alive:
            await asyncio.Event().wait()
        if not request.uid:
            raise P2PHandlerError("no uid, says a node that lives")
        info = {"inference_schema": ((BatchTensorDescriptor(HIDDEN),),)}
        return SimpleNamespace(serialized_info=MSGPackSerializer.dumps(info))

    async def iterate_protobuf_handler(self, peer_id, name, requests, answer_type):
        assert name == "TransformerConnectionHandler.rpc_inference"
        node = self._node(peer_id)
        if not node.opens:
            await asyncio.Event().wait()
        return self._serve(node, requests)

    async def call_binary_stream_handler(self, peer_id, name):
        assert name == lines.NAME
        node = self._node(peer_id)
        if not node.lines:
            raise P2PDaemonError("protocols not supported: [petals-win.line]")
        ends = socket.socketpair()
        theirs, own = [await asyncio.open_connection(sock=end) for end in ends]
        serving = asyncio.create_task(self._serve_line(node, lines.Line(*theirs)))
        self.serving.add(serving)
        serving.add_done_callback(self.serving.discard)
        return None, *own

    async def _serve_line(self, node: Node, line: lines.Line) -> None:
        [(name, _)] = await line.read()
        node.open_lines[name] = line
        try:
            line.send(name, b"")
            while True:
                for session, message in await line.read():
                    node.on_line += 1
                    node.open[session].put_nowait(runtime_pb2.ExpertRequest.FromString(message))
        except EOFError:
            pass
        finally:
            if node.open_lines[name] is line:
                del node.open_lines[name]
            line.close()

    async def _serve(self, node: Node, requests):
        node.streams += 1
        arrived: asyncio.Queue = asyncio.Queue()
        reading = asyncio.create_task(self._read(requests, arrived))
        session_id, blocks, done = None, [], set()
        try:
            while (request := await arrived.get()) is not None:
                metadata = MSGPackSerializer.loads(request.metadata) if request.metadata else {}
                if not request.tensors:
                    for page, about in enumerate(metadata.get(PAGES, ())):
                        node.kept[about] = page + 1, deepcopy(blocks)
                    break
                if session_id is None:
                    session_id = metadata["session_id"]
                    node.open[session_id] = arrived
                    first, *_, last = [int(uid.split(".")[1]) for uid in request.uid.split()] * 2
                    blocks = [Block(number) for number in range(first, last + 1)]
                if metadata["step_id"] in done:
                    continue
                done.add(metadata["step_id"])
                hidden, prompts, hypo_ids = (deserialize_torch_tensor(tensor) for tensor in request.tensors)
                seen = Request(len(node.requests), hidden.shape[1], metadata, bool(metadata.get("pushed")))
                node.requests.append(seen)
                self.log.append(("begin", node.name, metadata["step_id"].split("/")[1]))
                await node.script(seen)
                start = None if node.takes_back is None else metadata.get(START)
                about = {} if node.takes_back is None else {TAKES_BACK: node.takes_back}
                for page in reversed(metadata.get(PAGES, ())):
                    if node.says_of_pages is not None:
                        about[CACHED_PAGES] = node.says_of_pages
                        break
                    if page in node.kept:
                        about[CACHED_PAGES], left = node.kept[page]
                        blocks = deepcopy(left)
                        for block in blocks:
                            block.past = block.past[:, : PAGE_TOKENS * about[CACHED_PAGES] + 1]
                        break
                more = (prompts if prompts.numel() else None, hypo_ids if hypo_ids.numel() else None, start)
                hidden = through(blocks, hidden, *more) if hidden.shape[1] else hidden
                self.log.append(("end", node.name, metadata["step_id"].split("/")[1]))
                self._push(request, metadata, serialize_torch_tensor(node.answer_shape(hidden), NONE))
                wanted = metadata.get(OUTPUTS, {}).get(session_id) if node.cuts else None
                hidden = hidden if wanted is None else hidden[:, hidden.shape[1] - wanted :]
                output = serialize_torch_tensor(node.answer_shape(hidden), NONE)
                answer = ExpertResponse(tensors=[output], metadata=MSGPackSerializer.dumps(about))
                node.answered.append(answer.ByteSize())
                line = node.open_lines.get(metadata.get(LINE))
                if line is None or not line.send(session_id, answer.SerializeToString()):
                    yield answer
        finally:
            reading.cancel()
            node.open.pop(session_id, None)
            node.streams -= 1

    async def _read(self, requests, arrived: asyncio.Queue) -> None:
        async for request in requests:
            arrived.put_nowait(request)

    def _push(self, request, metadata: dict, output) -> None:
        for peer, session_id, _start, _end in metadata.get("next_servers", ())[:1]:
            node = next(node for node in self.nodes if node.peer_id.to_base58() == peer)
            further = metadata["next_servers"][1:]
            pushed = {**metadata, "session_id": session_id, "next_servers": further, "pushed": True}
            if session_id in node.open:
                node.open[session_id].put_nowait(
                    runtime_pb2.ExpertRequest(
                        uid="pushed",
                        tensors=[output, *request.tensors[1:]],
                        metadata=MSGPackSerializer.dumps(pushed),
                    )
                )
