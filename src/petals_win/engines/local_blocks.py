"""All blocks of a model in this process, as whoever decodes sees them: client/blocks.py over one span.

Knows sessions of a span and the memory that they share. Does not know tokens.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from petals_win.host.futures import AwaitableFuture
from petals_win.node.budget import CacheBudget
from petals_win.node.served import ServedSession
from petals_win.span.compute import ComputeThread
from petals_win.span.scheduler import Scheduler
from petals_win.span.session import Session
from petals_win.span.span import Span

_PATIENCE_S = 300.0  # that an answer waits in the line for memory


class LocalBlocks:
    """Implements Blocks. All methods are called on one event loop."""

    def __init__(self, span: Span, compute: ComputeThread, budget: CacheBudget):
        self._span, self._compute, self._budget = span, compute, budget
        self._scheduler = Scheduler(span, compute)
        self._open: set[LocalSession] = set()

    @property
    def longest(self) -> int:
        """How many tokens one session may have."""
        return self._budget.total_bytes // self._span.cache_bytes_per_token

    def open(self, max_length: int) -> LocalSession:
        session = LocalSession(self, max_length)
        self._open.add(session)
        return session

    def give_up(self) -> None:
        """End all steps, also those that wait for memory."""
        for session in list(self._open):
            session.give_up()


class _Scheduled(ServedSession):
    """Makes its steps together with those of other sessions."""

    def __init__(self, scheduler: Scheduler, *where: Any, **sizes: Any):
        super().__init__(*where, **sizes)
        self._scheduler = scheduler

    def _submit(self, session: Session, hidden: torch.Tensor, **more: Any) -> AwaitableFuture[torch.Tensor]:
        return self._scheduler.step(session, hidden, **more)


class LocalSession:
    """Implements BlockSession, with one row."""

    def __init__(self, blocks: LocalBlocks, max_length: int):
        self._blocks = blocks
        span = blocks._span
        self._served = _Scheduled(
            blocks._scheduler,
            span,
            blocks._compute,
            blocks._budget,
            batch_size=1,
            max_length=max_length,
            blocks=(span.start, span.end),
            patience=_PATIENCE_S,
        )
        self._stepping: asyncio.Task[object] | None = None
        self._given_up = False

    @property
    def position(self) -> int:
        return self._served.position

    async def step(
        self, hidden: torch.Tensor, *, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._stepping = asyncio.current_task()
        try:
            return await self._served.step(
                hidden, prompts=None if prompts is None else list(prompts), hypo_ids=hypo_ids, priority=0.0
            )
        except asyncio.CancelledError:
            if self._given_up:
                raise RuntimeError("The session was given up: this process is ending") from None
            raise
        finally:
            self._stepping = None

    def give_up(self) -> None:
        """End the step in work by a RuntimeError."""
        self._given_up = True
        if self._stepping is not None:
            self._stepping.cancel()

    async def close(self) -> None:
        """Returns when the memory is given back, behind what is in work on the compute thread."""
        self._blocks._open.discard(self)
        self._served.close()
        try:
            behind = self._blocks._compute.submit(_nothing)
        except RuntimeError:  # the compute thread has been stopped, and all memory with it
            return
        await asyncio.wait([asyncio.wrap_future(behind)])


def _nothing() -> None:
    """Its turn comes after everything that was asked for before."""
