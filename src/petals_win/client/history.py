"""What one node was sent in a session, kept so that another node can take its place.

Knows hidden states and beams. Does not know nodes or networks.
"""

from __future__ import annotations

import torch

_PARTS = 64  # so many steps are kept apart: joining them at every step would copy the whole history for each token


class InputHistory:
    """The inputs [batch, tokens, hidden] of a session's steps so far, in the order of its present beams."""

    def __init__(self) -> None:
        self.length = 0
        self._parts: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor, new: int, position: int, hypo_ids: torch.Tensor | None = None) -> None:
        """Take the step that begins at `position` and has `new` tokens; the same step a second time changes nothing.

        `inputs` end with the new tokens; they may begin earlier, at 0, when a node before this one was replaced.
        `hypo_ids` [batch]: row i goes on from what was row hypo_ids[i]. Raises ValueError if tokens in between are missing.
        """
        if self.length == position + new:
            return
        if self.length == 0 and inputs.shape[1] == position + new:
            self._parts = [inputs]
        elif self.length == position and inputs.shape[1] >= new:
            if hypo_ids is not None:
                self._parts = [self.whole()[hypo_ids]]
            elif len(self._parts) == _PARTS:
                self._parts = [self.whole()]
            self._parts.append(inputs[:, -new:])
        else:
            raise ValueError(
                f"The session is at token {position}, but {self.length} tokens are known, and {inputs.shape[1]} came"
            )
        self.length = position + new

    def whole(self) -> torch.Tensor:
        """All inputs as one tensor. Raises RuntimeError (torch's) if there are none."""
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
