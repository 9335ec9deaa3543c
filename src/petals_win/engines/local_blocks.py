"""All blocks of a model in this process, as whoever decodes sees them: client/blocks.py over one span.

Knows sessions of a span and the memory that they share. Does not know tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

import torch

from petals_win.client.pages import page_hashes
from petals_win.host.futures import AwaitableFuture
from petals_win.node.budget import CacheBudget
from petals_win.node.served import ServedSession
from petals_win.span.compute import ComputeThread
from petals_win.span.prefixes import PAGE_TOKENS, Prefixes
from petals_win.span.scheduler import Scheduler
from petals_win.span.span import Span

_ENDING = "The session was given up: this process is ending"
_PATIENCE_S = 300.0  # that an answer waits in the line for memory


class LocalBlocks:
    """Implements Blocks. All methods are called on one event loop."""

    def __init__(self, span: Span, compute: ComputeThread, budget: CacheBudget):
        self._span, self._compute, self._budget = span, compute, budget
        self._scheduler = Scheduler(span, compute)
        budget.spare = self._prefixes = Prefixes(compute)
        self._open: set[LocalSession] = set()
        self._given_up = False

    def longest(self, most: int) -> int:
        """How many tokens one session may have, of at most `most`."""
        return self._span.longest_session(self._budget.total_bytes, most)

    @property
    def cache_usage(self) -> float:
        """The share of the sessions' memory that is in use, from 0 to 1."""
        return 1 - self._budget.bytes_left / self._budget.total_bytes

    @property
    def promised_bytes(self) -> int:
        """What sessions may still take, beside what they hold and what ended ones have left."""
        return max(self._budget.bytes_left - self._prefixes.nbytes, 0)

    def open(self, max_length: int, tokens: Sequence[int] = ()) -> LocalSession:
        session = LocalSession(self, max_length, tokens)
        self._open.add(session)
        return session

    def give_up(self) -> None:
        """End all steps, also those that wait for memory, and let none begin any more."""
        self._given_up = True
        for session in list(self._open):
            session.give_up()


class LocalSession:
    """Implements BlockSession and BeginsAnywhere, with one row."""

    def __init__(self, blocks: LocalBlocks, max_length: int, tokens: Sequence[int]):
        self._blocks, self._prompt = blocks, tokens
        self._of_tokens_alone = True
        self.cached_tokens = 0
        span = blocks._span
        self._served = ServedSession(
            span,
            blocks._compute,
            blocks._scheduler,
            blocks._budget,
            batch_size=1,
            max_length=max_length,
            blocks=(span.start, span.end),
            patience=_PATIENCE_S,
            prefixes=blocks._prefixes,
        )
        self._stepping: asyncio.Task[object] | None = None

    @property
    def position(self) -> int:
        return self._served.position

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        self._of_tokens_alone &= prompts is None
        with self._in_work():
            if self.position == 0 and self._of_tokens_alone and hidden.shape[1] == len(self._prompt):
                self.cached_tokens = PAGE_TOKENS * await self._served.recall(page_hashes(self._prompt[:-1], ""))
                hidden = hidden[:, self.cached_tokens :]
            own = None if prompts is None else list(prompts)
            output = await self._served.step(hidden, prompts=own, hypo_ids=hypo_ids)
            return output if last is None else output[:, -last:]

    def begin(self, hidden: torch.Tensor) -> AwaitableFuture[torch.Tensor] | None:
        return self._served.begin(hidden)

    async def finish(self, begun: AwaitableFuture[torch.Tensor]) -> torch.Tensor:
        try:
            with self._in_work():
                return await self._served.finish(begun)
        finally:
            begun.cancel()

    @contextlib.contextmanager
    def _in_work(self) -> Iterator[None]:
        """Around what this task waits for, which ends by a RuntimeError as soon as all blocks are given up."""
        if self._blocks._given_up:
            raise RuntimeError(_ENDING)
        self._stepping = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self._blocks._given_up:
                raise RuntimeError(_ENDING) from None
            raise
        finally:
            self._stepping = None

    @property
    def takes_back(self) -> int:
        return self._served.takes_back

    def truncate(self, position: int) -> None:
        if not 0 < position <= self.position:
            raise ValueError(f"Of {self.position} tokens {position} cannot be kept")
        self._served.truncate(position)

    def give_up(self) -> None:
        """End the step in work; as all blocks are given up, by a RuntimeError."""
        if self._stepping is not None:
            self._stepping.cancel()

    async def close(self, tokens: Sequence[int] = ()) -> None:
        """Returns when the memory is given back, behind what is in work on the compute thread."""
        self._blocks._open.discard(self)
        await self._served.close(page_hashes(tokens[: self.position], "") if self._of_tokens_alone else ())
