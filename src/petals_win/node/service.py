"""What a node does for its clients: sessions over the blocks that it holds, and forward and backward passes without one.

Requests are checked here, sizes before they take memory. Knows spans, the compute thread and the budget for sessions. Does not
know messages or networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from petals_win.errors import NodeRefused
from petals_win.node.budget import CacheBudget
from petals_win.node.served import ServedSession, full_or
from petals_win.span.compute import ComputeThread
from petals_win.span.pace import Pace
from petals_win.span.passes import Passes
from petals_win.span.prefixes import Prefixes
from petals_win.span.scheduler import Scheduler
from petals_win.span.span import Span

# What comes first on the compute thread: somebody reads along with a session, nobody with fine-tuning.
_STEP_PRIORITY, _PASS_PRIORITY = 1.0, 2.0


@dataclass(frozen=True)
class ServiceInfo:
    """What a client must know before it asks."""

    session_tokens: int  # of one conversation, prompt and answer together
    tokens_left: int  # that the memory for sessions has room for now, in one block
    dtype: torch.dtype
    width: int  # of what passes from block to block for a token


class BlockService:
    """The blocks of a span. All coroutines run on one event loop; results are on the CPU.

    :param context_length: tokens that a session may have at most
    :param request_tokens: tokens of all rows that one forward or backward pass may have
    :param adapters: names of those that the span has loaded
    :param pace: is told how long steps take
    """

    def __init__(
        self,
        span: Span,
        compute: ComputeThread,
        budget: CacheBudget,
        *,
        context_length: int,
        request_tokens: int,
        adapters: tuple[str, ...] = (),
        pace: Pace | None = None,
    ):
        self.span, self.budget = span, budget
        self.context_length, self.request_tokens = context_length, request_tokens
        budget.spare = self._prefixes = Prefixes(compute)
        self._compute, self._scheduler, self._adapters = compute, Scheduler(span, compute, pace), adapters
        self._passes = Passes(span, compute, _PASS_PRIORITY)

    def info(self) -> ServiceInfo:
        """Of this moment."""
        span = self.span
        return ServiceInfo(
            session_tokens=span.longest_session(self.budget.total_bytes, self.context_length),
            tokens_left=max(0, self.budget.bytes_left) // span.block_cache_bytes_per_token,
            dtype=span.dtype,
            width=span.row.width,
        )

    def open(
        self,
        start: int,
        end: int,
        *,
        batch_size: int,
        max_length: int,
        adapter: str = "",
        patience: float = 0.0,
        owner: str = "",
    ) -> ServedSession:
        """A session of `batch_size` rows over the blocks [start, end); whoever opens it closes it.

        :param max_length: tokens that the client promises not to exceed; nothing is taken for it
        :param owner: who alone may find again what the session leaves behind
        :param patience: seconds that its first step may wait in the line for memory
        """
        self._check(start, end, adapter)
        return ServedSession(
            self.span,
            self._compute,
            self._scheduler,
            self.budget,
            batch_size=batch_size,
            max_length=min(max_length, self.context_length),
            blocks=(start, end),
            adapter=adapter,
            patience=patience,
            priority=_STEP_PRIORITY,
            prefixes=self._prefixes,
            owner=owner,
        )

    def close(self) -> None:
        """Free what ended sessions have left; no session may be opened any more."""
        self._prefixes.close()

    def check_hidden(self, shape: Sequence[int]) -> None:
        """Raise NodeRefused for hidden states of a shape that no pass takes."""
        row = self.span.row
        if len(shape) != 3 or shape[-1] != row.width or min(shape) < 0:
            raise NodeRefused(f"Hidden states must have the shape [batch, tokens, {row}], got {tuple(shape)}")
        tokens = shape[0] * shape[1]
        if tokens > self.request_tokens:
            raise NodeRefused(f"A request may have {self.request_tokens} tokens on this node, got {tokens}")

    async def forward(
        self, hidden: torch.Tensor, start: int, end: int, *, prompts: torch.Tensor | None = None, adapter: str = ""
    ) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] after the blocks [start, end).

        :param prompts: deep prompts [blocks, batch or 1, prefix, hidden], added to the first tokens of each block's input
        """
        self._check(start, end, adapter)
        self.check_hidden(hidden.shape)
        own = prompts_of_blocks(prompts, end - start)
        with _refusing():
            return await self._passes.forward(hidden, start, end, prompts=own, adapter=adapter)

    async def backward(
        self,
        hidden: torch.Tensor,
        grad_out: torch.Tensor,
        start: int,
        end: int,
        *,
        prompts: torch.Tensor | None = None,
        adapter: str = "",
    ) -> list[torch.Tensor]:
        """Gradients with respect to the inputs of `forward` and, if there were prompts, to them, in their shapes."""
        self._check(start, end, adapter)
        self.check_hidden(hidden.shape)
        if grad_out.shape != hidden.shape:
            raise NodeRefused(f"Gradients of the shape {list(grad_out.shape)} do not fit {list(hidden.shape)}")
        own = prompts_of_blocks(prompts, end - start)
        with _refusing():
            grad, of_prompts = await self._passes.backward(hidden, grad_out, start, end, prompts=own, adapter=adapter)
        return [grad] if of_prompts is None else [grad, torch.stack(of_prompts)]

    def _check(self, start: int, end: int, adapter: str) -> None:
        """Raises ValueError: another node may have what this one lacks."""
        if not self.span.start <= start < end <= self.span.end:
            raise ValueError(f"This node has the blocks {self.span.start}:{self.span.end}, not {start}:{end}")
        if not self.span.cuts.allow(start, end):
            raise NodeRefused(self.span.cuts.why_not(start, end))
        if adapter and adapter not in self._adapters:
            raise ValueError(f"This node has no adapter {adapter!r}")


def prompts_of_blocks(prompts: torch.Tensor | None, blocks: int) -> list[torch.Tensor] | None:
    """Deep prompts [blocks, batch or 1, prefix, hidden] as one tensor for each block."""
    if prompts is None:
        return None
    if prompts.ndim != 4 or len(prompts) != blocks:
        raise NodeRefused(f"Deep prompts have the shape {tuple(prompts.shape)}, but {blocks} blocks were asked for")
    return list(prompts.unbind(0))


@contextmanager
def _refusing() -> Iterator[None]:
    """What the span says of shapes that do not fit is told to whoever sent them, and that there was no memory for them."""
    try:
        yield
    except ValueError as e:
        raise NodeRefused(f"{e}.") from e
    except RuntimeError as e:
        raise full_or(e, "a pass without a session") from None
