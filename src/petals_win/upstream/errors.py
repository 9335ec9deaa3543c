"""The one way in which a patch is refused."""

from __future__ import annotations

from petals_win.errors import UserError


class PatchError(UserError):
    """A patch that cannot be applied: which one, to what, and why. `reason` may end in what to do next."""

    def __init__(self, patch: str, target: str, reason: str):
        super().__init__(f"{patch}: {target}: {reason}" if target else f"{patch}: {reason}")
