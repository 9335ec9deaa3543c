"""All blocks of a model, wherever they are computed, as whoever decodes sees them: sessions that take hidden states and give them back.

Knows shapes and positions. Does not know whether the blocks lie in this process or on the nodes of a swarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from petals_win.host.futures import AwaitableFuture


class BlockSession(Protocol):
    """One conversation, or a batch of equally long ones, in all blocks of a model. One step at a time."""

    @property
    def position(self) -> int:
        """How many tokens the session has seen."""
        ...

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the first step were not computed, since an earlier session had left what comes of them."""
        ...

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """Continue by hidden states [batch, tokens, hidden] of at least one token; returns the same shape, on the CPU.

        Of the first step of a session that was opened with token ids, only the last tokens are returned, at least one. With `last`,
        at least 1, only so many of the last tokens are returned.

        `prompts` [blocks, batch, p, hidden] is added to each block's input at the first p tokens of this step. `hypo_ids`
        (int64, [batch]): row i goes on from what row hypo_ids[i] has seen. Raises NodeFull if there was no room in time,
        NodeRefused for what will never be done, and errors of the way to the blocks. Cancelling the task that waits ends
        the step within 100 ms; the session may be closed afterwards, and nothing else.
        """
        ...

    @property
    def takes_back(self) -> int:
        """How many of its last tokens can be forgotten without computing others again; 0 before its first step."""
        ...

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on, at least one being kept, between two steps.

        It costs nothing for tokens of the last step; a session may compute others again. Raises ValueError for a position that
        the session has not reached.
        """
        ...

    async def close(self, tokens: Sequence[int] = ()) -> None:
        """Give back all that the session holds. Closing twice is allowed; a step in work ends.

        `tokens`: the ids of what it has seen, as far as they are known, so that later sessions may go on from it.
        """
        ...


@runtime_checkable
class BeginsAnywhere(Protocol):
    """What a BlockSession has besides whose steps can set out from any thread, with nothing to wait for."""

    def begin(self, hidden: torch.Tensor) -> AwaitableFuture[torch.Tensor] | None:
        """Begin a step, while no other thread calls the session; None if that has to wait, as `step` does.

        Whoever has begun it calls `finish`, or cancels it. Raises what `step` would at once.
        """
        ...

    async def finish(self, begun: AwaitableFuture[torch.Tensor]) -> torch.Tensor:
        """What `step` would have returned, or raised."""
        ...


class Blocks(Protocol):
    """All blocks of one model."""

    def open(self, max_length: int, tokens: Sequence[int] = ()) -> BlockSession:
        """A session of one row that will have at most `max_length` tokens; waits for nothing and sends nothing.

        `tokens`: the ids of the first step's, so that it may go on from what an earlier session has left of them.
        """
        ...
