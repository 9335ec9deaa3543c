"""A session as a node serves it: its place in the node's budget, and its steps, which are computed together with others'.

Knows spans, schedulers, budgets and an event loop. Does not know networks.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from petals_win.errors import NodeFull, NodeRefused
from petals_win.host.futures import AwaitableFuture
from petals_win.node.budget import CacheBudget, Share
from petals_win.span.compute import ComputeThread
from petals_win.span.decoder import Prompts
from petals_win.span.prefixes import PAGE_TOKENS, Prefixes
from petals_win.span.scheduler import Scheduler
from petals_win.span.session import Session
from petals_win.span.shortage import is_shortage
from petals_win.span.span import Span
from petals_win.span.state import CannotTruncate, State

logger = logging.getLogger(__name__)

# A session grows by a quarter of its length, but by no fewer tokens than this: what is held is copied then.
PIECE_TOKENS = 256
_ROUND_TOKENS = 64
# To grow, about so many seconds; then the session gives back what it has. Sessions of several nodes can wait for each other in a
# circle, which ends sooner if they do not give up at the same time.
GROW_SECONDS = 15.0


def room_for(tokens: int, longest: int) -> int:
    """For how many tokens to take memory when so many are there, of at most `longest`."""
    ahead = tokens + max(PIECE_TOKENS, tokens // 4)
    return min(-(-ahead // _ROUND_TOKENS) * _ROUND_TOKENS, longest)


class ServedSession:
    """A session of `batch_size` rows over the blocks [start, end). All methods are called on one event loop.

    No memory is taken before the first step, which waits in the line up to `patience` seconds. `longest` is what the node can
    hold of it: the client's `max_length`, or less; `takes_back`, how many of its last tokens `truncate` can take back. Raises
    NodeRefused for sizes that cannot be.
    """

    def __init__(
        self,
        span: Span,
        compute: ComputeThread,
        scheduler: Scheduler,
        budget: CacheBudget,
        *,
        batch_size: int,
        max_length: int,
        blocks: tuple[int, int],
        patience: float,
        adapter: str = "",
        priority: float = 0.0,
        prefixes: Prefixes | None = None,
        owner: str = "",
    ):
        if batch_size < 1 or max_length < 1:
            raise NodeRefused(f"A session needs at least one sequence of one token, not {batch_size} of {max_length}.")
        self._span, self._compute, self._scheduler, self._budget = span, compute, scheduler, budget
        self.batch_size, self._adapter, self._blocks, self._priority = batch_size, adapter, blocks, priority
        self._prefixes, self._owner = prefixes, (owner, *blocks, adapter)
        self._pages_of_past = 0
        self._max_length, self._width = max_length, span.row.width  # looking it up takes longer than a check
        self.longest = span.longest_session(budget.total_bytes, max_length, batch_size, *blocks)
        if self.longest < 1:
            raise NodeRefused(f"This PC has no room for {batch_size} sequences.")
        self.takes_back = span.takes_back(self.longest, *blocks)
        self._patience = patience
        self._start: int | None = None  # how many tokens the next step keeps, if not all
        self._share: Share | None = None
        self._session: Session | None = None

    @property
    def position(self) -> int:
        """How many tokens it has seen, without those taken back."""
        if self._start is not None:
            return self._start
        return self._session.position if self._session is not None else 0

    def truncate(self, tokens: int) -> None:
        """Let the next step forget all but the first `tokens`. Raises NodeRefused if there are not so many."""
        if not 0 <= tokens <= self.position:
            raise NodeRefused(f"The session has seen {self.position:,} tokens, {tokens:,} of which cannot be kept.")
        self._start = tokens

    def check_step(self, shape: Sequence[int]) -> None:
        """Raise NodeRefused for hidden states of a shape that the session cannot take now."""
        if len(shape) != 3 or shape[0] != self.batch_size or shape[2] != self._width or shape[1] < 0:
            raise NodeRefused(
                f"Hidden states must be [{self.batch_size}, tokens, {self._span.row}], not {list(shape)}."
            )
        tokens = self.position + shape[1]
        if tokens <= self.longest:
            return
        if self.longest == self._max_length:
            raise NodeRefused(f"The session was opened for {self.longest:,} tokens, but {tokens:,} came.")
        raise NodeRefused(
            f"This PC holds at most {self.longest:,} tokens of one conversation, but {tokens:,} came. Shorten it, or start a "
            "new chat."
        )

    async def step(
        self, hidden: torch.Tensor, *, prompts: Prompts | None = None, hypo_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Span.step, with the result on the CPU; no tokens at all only ask whether there is room.

        Raises NodeFull if there was none in time, NodeRefused for what the span does not take. A step that is cancelled is dropped
        before its turn, and a long one between two of its chunks.
        """
        self.check_step(hidden.shape)
        session = await self._with_room(self.position + hidden.shape[1])
        if hidden.shape[1] == 0:
            return hidden
        return await self.finish(self._set_out(session, hidden, prompts, hypo_ids))

    def begin(self, hidden: torch.Tensor) -> AwaitableFuture[torch.Tensor] | None:
        """Begin a step, in any thread while no other one calls the session; None if there may be no room for it."""
        session = self._session
        if session is None or self.position + hidden.shape[1] > session.room:
            return None
        self.check_step(hidden.shape)
        return self._set_out(session, hidden)

    def _set_out(
        self,
        session: Session,
        hidden: torch.Tensor,
        prompts: Prompts | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> AwaitableFuture[torch.Tensor]:
        start, self._start = self._start, None
        return self._scheduler.step(
            session, hidden, prompts=prompts, hypo_ids=hypo_ids, start=start, priority=self._priority
        )

    async def finish(self, begun: AwaitableFuture[torch.Tensor]) -> torch.Tensor:
        """Wait for a step that was begun; as `step`."""
        try:
            return await begun
        except CannotTruncate:
            raise  # a failure: with its whole past the session can go on, here or elsewhere
        except ValueError as e:
            raise NodeRefused(f"{e}.") from e
        except RuntimeError as e:
            raise full_or(e, "a conversation") from None

    async def recall(self, pages: Sequence[bytes]) -> int:
        """Begin with what an earlier session of the same owner has left of the tokens of these pages; returns of how many of them.

        Raises NodeFull if there was no room for it in time.
        """
        if self._prefixes is None or self.batch_size != 1 or self._session is not None:
            return 0
        pages = pages[: self.longest // PAGE_TOKENS]
        found = self._prefixes.find(self._owner, pages)
        if found is None:
            return 0
        await self._with_room(found[1] * PAGE_TOKENS, pages)
        return self._pages_of_past

    async def _with_room(self, tokens: int, pages: Sequence[bytes] = ()) -> Session:
        """The session, with memory promised to it for so many tokens; a new one with what is left of `pages`."""
        room = room_for(tokens, self.longest)
        if self._session is None:
            promise, piece = self._bytes_for(self.longest), self._bytes_for(min(PIECE_TOKENS, self.longest))
            if self._share is None:
                self._share = await self._budget.admit(self._bytes_for(room), promise, piece, self._patience)
            found = self._prefixes.find(self._owner, pages) if self._prefixes is not None else None
            past = found and (found[0], found[1] * PAGE_TOKENS)
            how = {"room": room, "declared": self._max_length, "past": past}
            opening = self._compute.submit(
                self._span.open, self.batch_size, self.longest, *self._blocks, self._adapter, **how
            )
            try:
                self._session = await opening
                self._pages_of_past = self._session.position // PAGE_TOKENS
            except KeyError as e:
                raise NodeRefused(f"{e.args[0]}.") from e
            except RuntimeError as e:
                raise full_or(e, "a conversation") from None
        elif tokens > self._session.room:
            assert self._share is not None
            await self._share.grow(self._bytes_for(room), GROW_SECONDS * random.uniform(0.7, 1.3))
            self._session.room = room
        return self._session

    def _bytes_for(self, tokens: int) -> int:
        return self._span.session_bytes(self.batch_size, tokens, *self._blocks)

    def close(self, pages: Sequence[bytes] = ()) -> asyncio.Future[None]:
        """Free the memory, and then the place in the budget, as soon as the compute thread is through with its last step.

        `pages`: the hashes of what the session has seen, so that a later one finds it. What is returned is done when the place is
        free and the pages can be found. Closing twice is allowed.
        """
        share, session, loop = self._share, self._session, asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()
        pages = self._worth_keeping(pages)
        self._share = self._session = None
        if share is None:
            closed.set_result(None)
            return closed

        def released(state: State | None) -> None:
            if state is not None and self._prefixes is not None:
                self._prefixes.keep(self._owner, pages[: state.position // PAGE_TOKENS], state)
            share.release()
            if not closed.done():  # whoever waits may have been cancelled
                closed.set_result(None)

        def left(future: Future[State | None]) -> None:
            state = None if future.cancelled() or future.exception() else future.result()
            if not loop.is_closed():
                loop.call_soon_threadsafe(released, state)

        try:
            # Behind whatever the session still has in work there, its opening included.
            self._compute.submit(_leave, session, len(pages) * PAGE_TOKENS).add_done_callback(left)
        except RuntimeError:  # the node is shutting down
            share.release()
            closed.set_result(None)
        return closed

    def _worth_keeping(self, pages: Sequence[bytes]) -> Sequence[bytes]:
        """Those that the session has whole."""
        if self._prefixes is None or self.batch_size != 1 or not self._span.may_be_taken_up(self._max_length):
            return ()
        return pages[: self.position // PAGE_TOKENS]


def full_or(error: RuntimeError, for_what: str) -> Exception:
    """NodeFull if it was memory that the device lacked `for_what`, else the error itself."""
    return NodeFull(f"This PC has no memory left for {for_what} now.") if is_shortage(error) else error


def _leave(session: Session | None, tokens: int) -> State | None:
    if session is not None and tokens:
        return session.leave(tokens)
    if session is not None:
        session.close()
    return None
