"""A session of a span, and one step of it, which is computed in pieces.

Knows what a session has seen and what is left of a step. Does not know how blocks compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from petals_win.span.decoder import Prompts
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.span.state import CannotTruncate, State


@dataclass(eq=False)
class Session:
    """The state of one conversation, or of a batch of equally long ones, in the blocks [start, end).

    `room` is how many tokens it may keep now, up to `max_length`; whoever opened it may raise it between two steps, and the
    cache grows when a step needs it. `declared` is how many tokens the text may have in the end, for tables that depend on it.
    """

    batch_size: int
    max_length: int
    room: int
    declared: int
    start: int
    end: int
    adapter: str
    cache: State | None = field(repr=False)

    @property
    def position(self) -> int:
        """How many tokens the session has seen."""
        return self.open_cache.position

    @property
    def open_cache(self) -> State:
        """Raises ValueError once the session is closed."""
        if self.cache is None:
            raise ValueError("The session is closed")
        return self.cache

    def truncate(self, tokens: int) -> None:
        """Forget all tokens after the first `tokens`.

        Raises ValueError if the session has not seen so many, CannotTruncate if its state leads no way back.
        """
        if not 0 <= tokens <= self.position:
            raise ValueError(f"The session has seen {self.position} tokens, {tokens} of which cannot be kept")
        if tokens < self.position:
            self.open_cache.truncate(tokens)

    def leave(self, tokens: int) -> State | None:
        """Close the session, and return its state after `tokens` tokens, which is the caller's to free; None if there is none.

        It may be after some whole pages of them, if there is no other one.
        """
        state, self.cache = self.cache, None
        if state is None:
            return None
        pages = (end * PAGE_TOKENS for end in range(tokens // PAGE_TOKENS, 0, -1))
        try:
            tokens = next((position for position in (tokens, *pages) if state.leads_to(position)), 0)
            if tokens == 0:
                raise CannotTruncate
            if tokens < state.position:
                state.truncate(tokens)
            state.shrink(tokens)
        except (CannotTruncate, RuntimeError):  # there is no way back, or no memory for it
            state.free()
            return None
        return state

    def close(self) -> None:
        """Free the cache. Closing twice is allowed."""
        if self.cache is not None:
            self.cache.free()
        self.cache = None


class Step:
    """A step of a session, begun by `Span.begin`: its tokens go through the blocks in pieces, the first ones first."""

    def __init__(
        self,
        session: Session,
        hidden: torch.Tensor,
        prompts: Prompts | None,
        reordered: bool,
        continues: bool = True,
    ) -> None:
        """`hidden` is [batch, tokens, hidden]. `reordered`: the session's rows have other pasts than before the step.

        `continues`: the blocks take several tokens at once after others. If not, only the first ones of a session go together.
        """
        self.session = session
        self.prompts = prompts
        self._hidden = hidden
        self._began = session.position
        state = session.open_cache
        self._before = None if state.truncates else state.fork(self._began, state.capacity)
        self._reordered, self._continues = reordered, continues
        # A later session with the same prompt goes on from its last whole page. Tokens that come one by one are others' answers.
        page = self.end // PAGE_TOKENS * PAGE_TOKENS
        may_be_taken_up = session.batch_size == 1 and hidden.shape[1] > 1 and page > self._began
        self._stop = page if may_be_taken_up and state.keep(page) else 0
        self._done = 0
        self._outputs: list[torch.Tensor] = []

    @property
    def left(self) -> int:
        """How many tokens of each row have not been computed yet."""
        return self._hidden.shape[1] - self._done

    @property
    def end(self) -> int:
        """How many tokens the session has seen after the step."""
        return self._began + self._hidden.shape[1]

    def at_once(self, tokens: int) -> int:
        """How many of the next tokens of each row, of at most so many, go through the blocks in one pass."""
        if not self._continues and self.session.position > 0:
            return min(tokens, self.left, 1)
        ahead = self._stop - self.session.position
        return min(tokens, self.left, ahead if ahead > 0 else tokens)

    def piece(self, tokens: int) -> tuple[torch.Tensor, Prompts | None]:
        """The next tokens of each row, [batch, at most `tokens`, hidden], and what is left of the prompts for them."""
        tokens = self.at_once(tokens)
        hidden = self._hidden[:, self._done : self._done + tokens]
        prompts = self.prompts and [prompt if prompt is None else prompt[:, self._done :] for prompt in self.prompts]
        return hidden, prompts

    def took(self, output: torch.Tensor) -> None:
        """The next tokens have been computed, with this output, and the session has seen them."""
        self._outputs.append(output)
        self._done += output.shape[1]
        self.session.open_cache.position += output.shape[1]

    def output(self) -> torch.Tensor:
        """[batch, tokens, hidden], of all pieces."""
        return self._outputs[0] if len(self._outputs) == 1 else torch.cat(self._outputs, dim=1)

    def undo(self) -> None:
        """Leave the session as it was before the step; if there is no way back, as after rows were reordered, close it."""
        if self.session.cache is None:
            return
        if self._before is not None:
            self.session.cache.free()
            self.session.cache, self._before = self._before, None
        elif self._reordered:
            self.session.close()
        else:
            try:
                self.session.cache.truncate(self._began)
            except CannotTruncate:
                self.session.close()
