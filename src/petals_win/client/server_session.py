"""A session at one node: chunks go out, answers come back in the same order, and a node that says nothing is asked whether it lives.

Knows one node, a stream to it and, if it has one, the line that it shares with other sessions. Does not know what other nodes do, nor what to do when this one fails. All of it runs on
the event loop that opened it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from google.protobuf.message import DecodeError

from petals_win.client.wire import BadAnswer, NodeRpc, last_request, messages, read_about, read_answer, step_request
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.swarm.lines import Line, Lines, Way
from petals_win.swarm.protocol import CACHED_PAGES, LINE, OUTPUTS, PAGES, START, TAKES_BACK

logger = logging.getLogger(__name__)

SILENT_SECONDS = 2.0  # without an answer, after which a node is asked whether it is there
PING_SECONDS = 2.0  # that it has to say so
_PINGS_ALONE = 3  # without an answer, where no other node has the blocks
_MOST_UNREAD = 16  # answers; no more chunks than a few are ever in flight
_CLOSE_SECONDS = 3.0  # for a node's last word; it frees the session anyway when the stream ends


class NodeLost(ConnectionError):
    """A node is not there any more, or its session is not."""


class NodeSilent(NodeLost):
    """A node says nothing at all, though it is connected."""


@dataclass(frozen=True)
class _Sent:
    start: int
    shape: torch.Size
    wanted: int  # of its last outputs
    patience: float


class ServerSession:
    """The blocks [start, end) at one node. `sent` and `answered` count the session's tokens, past ones included.

    :param uid: the blocks, as requests to this node name them
    :param metadata: what goes along with the first request
    :param answer_seconds: how long a node that lives may compute one chunk
    :param remembers: whether it is one of ours, which may be asked for what earlier sessions have left
    :param lines: on which short steps go together with those of other sessions, if the node may have them
    :param alone: tells whether no other node has the blocks, so that this one may be silent for longer
    """

    def __init__(
        self,
        rpc: NodeRpc,
        start: int,
        end: int,
        uid: str,
        *,
        compression: Any,
        metadata: dict[str, Any],
        answer_seconds: float,
        remembers: bool,
        lines: Lines | None,
        alone: Callable[[], bool],
    ):
        self.peer_id, self.start, self.end = rpc.peer_id, start, end
        self.sent = self.answered = 0
        self.hypo_ids: torch.Tensor | None = None  # that the next chunk brings along
        self.closed = False
        self.takes_back = 0  # tokens at once, as the node says with its first answer
        self.keeps: int | None = None  # tokens, before the next chunk, if not all
        self._rpc, self._uid, self._compression, self._answer_seconds = rpc, uid, compression, answer_seconds
        self.remembers, self._lines, self._alone = remembers, lines, alone
        self._way: Way | None = None
        self._cached_pages = 0  # as the node says
        self.session_id = str(uuid4())
        self._metadata = metadata
        self._in_flight: deque[_Sent] = deque()
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self._inbox = _Inbox()
        self._reading: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """How many chunks were sent and not answered."""
        return len(self._in_flight)

    @property
    def place(self) -> tuple[str, str, int, int]:
        """By what the node before this one finds the session."""
        return self.peer_id.to_base58(), self.session_id, self.start, self.end

    async def open(self, seconds: float) -> None:
        """Open the stream. Raises NodeSilent after `seconds`, or after what a node may be silent for in a step if that is less, or more for
        an only one; and what the network raises."""
        if self._alone():
            seconds = max(seconds, SILENT_SECONDS + _PINGS_ALONE * PING_SECONDS)
        else:
            seconds = min(seconds, SILENT_SECONDS + PING_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                answers = await self._rpc.inference(_until_last(self._requests))
        except TimeoutError as e:
            raise NodeSilent(f"A node said nothing for {seconds:.0f} s") from e
        self._reading = asyncio.create_task(self._inbox.read(answers))
        self._join_the_way()
        await asyncio.sleep(0)  # a generator that was never started would not clean up when its task is cancelled

    def send(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        *,
        step_id: str,
        patience: float,
        push_to: Sequence[ServerSession],
        outputs: Mapping[str, int] = {},
        pages: Sequence[bytes] = (),
        whole: bool = False,
    ) -> None:
        """Send the next chunk [batch, tokens, hidden], with `hypo_ids` if there are any.

        :param prompts: deep prompts [blocks of the model, batch or 1, prefix, hidden], for the first chunk of a session
        :param patience: seconds that the node may keep a new session waiting for room
        :param push_to: the sessions behind, whose nodes get the outputs from this one, too
        :param outputs: how many of the last outputs are wanted, for sessions here and behind of which not all are, by `session_id`
        :param whole: whether it is a step, rather than a part of one. A session's first step and what is in parts goes on the
            session's own stream, as does what is too long for a line
        """
        metadata: dict[str, Any] = {"session_id": self.session_id, "step_id": step_id}
        if self.sent == 0:
            metadata |= {**self._metadata, "alloc_timeout": patience}
        elif push_to:
            metadata["next_servers"] = [later.place for later in push_to]
        if outputs:
            metadata[OUTPUTS] = dict(outputs)
        if pages:
            metadata[PAGES] = list(pages)
        if self.keeps is not None:
            metadata[START], self.keeps = self.keeps, None
        # Requests on the stream and on the line may overtake each other, so nothing may be in flight.
        way = self._way if whole and self.sent and not self._in_flight else None
        line = None if way is None else way.line
        if way is not None and line is not None:
            metadata[LINE] = way.name
            for each in (self, *push_to):
                each._may_answer_on_a_line()
        theirs = None if prompts is None else prompts[self.start : self.end]
        how = {"compression": self._compression, "metadata": metadata}
        request = step_request(self._uid, hidden, theirs, self.hypo_ids, **how)
        if line is None or not line.send(self.session_id, request.SerializeToString()):
            self._requests.put_nowait(request)
        self.hypo_ids = None
        tokens = hidden.shape[1]
        wanted = outputs.get(self.session_id, tokens)
        self._in_flight.append(_Sent(self.sent, hidden.shape, wanted, patience if self.sent == 0 else 0.0))
        self.sent += tokens

    def _join_the_way(self) -> None:
        if self._way is not None or self._lines is None or self._reading is None:
            return
        self._way = self._lines.to(self.peer_id)
        if self._way is not None:
            self._way.join(self.session_id, self._inbox)
            self._reading.add_done_callback(partial(_leave, self._way, self.session_id))

    def _may_answer_on_a_line(self) -> None:
        """The step that sets out. A node behind may do so before the step is sent to it from here, and on a line that was not open then."""
        self._join_the_way()
        if self._way is not None and self._inbox.line is None:
            self._inbox.line = self._way.tried

    async def recall(self, pages: Sequence[bytes], hidden: torch.Tensor, *, step_id: str, patience: float) -> int:
        """Let a new session begin with what an earlier one has left of the tokens of these pages; returns of how many pages.

        `hidden` are hidden states [1, 0, hidden], without a token. `sent` and `answered` count those tokens then. Raises as
        `answer`, and BadAnswer for a number of pages that cannot be.
        """
        self.send(hidden, None, step_id=step_id, patience=patience, push_to=[], pages=pages)
        await self.answer()
        if not 0 <= self._cached_pages <= len(pages):
            raise BadAnswer(f"The node has {self._cached_pages} of {len(pages)} pages")
        self.sent = self.answered = PAGE_TOKENS * self._cached_pages
        return self._cached_pages

    def truncate(self, position: int) -> bool:
        """Let the next chunk follow the first `position` tokens; False if the node cannot take back the others.

        Nothing may be in flight.
        """
        if self.sent - position > self.takes_back:
            return False
        self.sent = self.answered = self.keeps = position
        return True

    async def answer(self) -> tuple[int, torch.Tensor]:
        """The answer [batch, tokens, hidden] to the oldest chunk in flight, and the token at which it begins.

        It has the chunk's last tokens, at least those whose outputs are wanted.

        Raises NodeLost when the node does not live, TimeoutError when it takes too long, and the node's own error.
        """
        chunk = self._in_flight[0]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._answer_seconds + chunk.patience
        while not self._inbox:
            left = deadline - loop.time()
            if left <= 0:
                raise TimeoutError(f"A node computed longer than {self._answer_seconds:.0f} s")
            try:
                async with asyncio.timeout(min(left, SILENT_SECONDS)):
                    await self._inbox.news.wait()
            except TimeoutError:
                await self._see_whether_it_lives()
        response = self._inbox.take()
        output = read_answer(response, chunk.shape, chunk.wanted)
        if chunk.start == 0:
            about = read_about(response)
            self.takes_back = max(self.takes_back, _count(about.get(TAKES_BACK)))
            self._cached_pages = _count(about.get(CACHED_PAGES))
        self._in_flight.popleft()
        self.answered += chunk.shape[1]
        return chunk.start + chunk.shape[1] - output.shape[1], output

    async def _see_whether_it_lives(self) -> None:
        """Returns when the node says so, or answers. Raises NodeLost if it does neither in time."""
        silent = SILENT_SECONDS
        for _ in range(_PINGS_ALONE):
            if await self._says_something():
                return
            silent += PING_SECONDS
            if not self._alone():
                break
        self._give_the_line_up()
        raise NodeSilent(f"A node said nothing for {silent:.0f} s")

    async def _says_something(self) -> bool:
        """Whether the node answers, if only a ping. Raises NodeLost if it cannot be reached."""
        ping = asyncio.ensure_future(self._rpc.ping())
        news = asyncio.ensure_future(self._inbox.news.wait())
        try:
            done, _ = await asyncio.wait({ping, news}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if news not in done and ping in done and (error := ping.exception()) is not None:
                self._give_the_line_up()
                raise NodeLost(f"A node cannot be reached any more: {error}") from error
            return bool(done)
        finally:
            for waiting in (ping, news):
                waiting.cancel()
            await asyncio.gather(ping, news, return_exceptions=True)

    def _give_the_line_up(self) -> None:
        if self._way is not None:
            self._way.give_up()

    async def close(self, pages: Sequence[bytes] = ()) -> None:
        """End the session in order, which takes at most 3 s. Closing twice is allowed.

        `pages`: the hashes of what it has seen, by which a later session may find it.
        """
        if self.closed or self._reading is None:
            return
        self.closed = True
        if self.sent and not self._in_flight and not self._reading.done():
            self._requests.put_nowait(last_request({PAGES: list(pages)} if pages and self.remembers else None))
            await asyncio.wait({self._reading}, timeout=_CLOSE_SECONDS)
        self._reading.cancel()
        await asyncio.wait({self._reading})

    def abort(self) -> None:
        """End the stream at once, and with it the session at the node."""
        self.closed = True
        if self._reading is not None:
            self._reading.cancel()

    def __del__(self) -> None:
        # Python may call it on any thread, and nothing may be waited for there.
        reading = getattr(self, "_reading", None)
        if reading is not None and not reading.done() and not (loop := reading.get_loop()).is_closed():
            loop.call_soon_threadsafe(reading.cancel)


def _leave(way: Way, session_id: str, _reading: object) -> None:
    way.leave(session_id)


def _count(said: object) -> int:
    """A number that a node says; 0 if it says none."""
    return said if type(said) is int else 0


class _Inbox:
    """Answers as they come. It is apart from the session so that the task that reads does not keep that alive."""

    def __init__(self) -> None:
        self.news = asyncio.Event()  # there is something to take
        self.line: int | None = None  # the number of the first one on which the answer to the step in work may come
        self._answers: deque[Any] = deque()
        self._end: Exception | None = None

    def __bool__(self) -> bool:
        return self.news.is_set()

    async def read(self, answers: AsyncGenerator[Any, None]) -> None:
        try:
            async with aclosing(answers):
                async for answer in answers:
                    self._put(answer)
                    if isinstance(self._end, BadAnswer):
                        return
            self._ended(NodeLost("A node ended the session"))
        except Exception as e:
            self._ended(e)
        except asyncio.CancelledError:
            self._ended(NodeLost("The session at this node is closed"))
            raise

    def received(self, message: bytes) -> None:
        """From the line; without a word: the node does not have the session, or too much waits there."""
        try:
            if message:
                self._put(messages.ExpertResponse.FromString(message))
            else:
                self._ended(NodeLost("A node does not take the session's steps"))
        except DecodeError as e:
            self._ended(BadAnswer(f"A node answered what cannot be read: {e}"))

    def lost(self, line: Line) -> None:
        if self.line is not None and line.number >= self.line:
            self._ended(NodeLost("The line to a node has ended"))

    def _put(self, answer: Any) -> None:
        self._answers.append(answer)
        self.news.set()
        if len(self._answers) > _MOST_UNREAD:
            self._ended(BadAnswer("A node answers more than it was asked"))

    def _ended(self, why: Exception) -> None:
        self._end = self._end or why
        self.news.set()

    def take(self) -> Any:
        """The oldest answer. Raises how the stream ended if there is no more."""
        if self._answers:
            answer, self.line = self._answers.popleft(), None
            if not self._answers and self._end is None:
                self.news.clear()
            return answer
        assert self._end is not None
        raise self._end


async def _until_last(requests: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while True:
        request = await requests.get()
        yield request
        if not request.tensors:
            return
