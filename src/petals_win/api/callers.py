"""Who asks, and how much they may ask for in a minute. Knows limits and clocks; not HTTP, and not how a key is checked.

The caller of a request is found by everything that runs for it: a guard sets `current` before the routes are asked.
"""

from __future__ import annotations

import math
import time
from contextvars import ContextVar

from petals_win.api.created_keys import CreatedKey
from petals_win.api.errors import ApiError
from petals_win.engines.base import GenerationRequest

_BYTES_PER_TOKEN = 4  # about, in most languages and tokenizers: until the engine has counted


class Allowance:
    """So many in a minute: all of them at once, after which they come back evenly. It can be overdrawn."""

    def __init__(self, per_minute: int):
        self._most = per_minute
        self._left = float(per_minute)
        self._at = time.monotonic()

    def take(self, count: float) -> None:
        """Take so many; a negative number gives back."""
        self._refill()
        self._left = min(self._most, self._left - count)

    def seconds_until_one(self) -> float:
        """How long it takes until there is one to take: 0 if there is."""
        self._refill()
        return max(0.0, 1 - self._left) * 60 / self._most

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now


class Caller:
    """Whoever sends one key: what is left of its limits."""

    def __init__(self, key: CreatedKey):
        self._requests = Allowance(key.requests_per_minute) if key.requests_per_minute else None
        self._tokens = Allowance(key.tokens_per_minute) if key.tokens_per_minute else None

    def admit(self) -> None:
        """Count one request. Raises ApiError 429 if a limit of the key is used up."""
        for what, allowance in (("requests", self._requests), ("tokens", self._tokens)):
            if allowance is not None and (seconds := allowance.seconds_until_one()):
                raise ApiError(
                    429,
                    f"The {what} that this key may use in a minute are used up. Try again in {math.ceil(seconds)} s.",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(math.ceil(seconds))},
                )
        if self._requests is not None:
            self._requests.take(1)

    def charge(self, tokens: float) -> None:
        """Count tokens; a negative number gives back. Nobody is stopped by it before the next request."""
        if self._tokens is not None:
            self._tokens.take(tokens)


class Bill:
    """The tokens of one request, charged to its caller as they come, so that an answer that is given up is not free."""

    def __init__(self, caller: Caller | None, request: GenerationRequest):
        """The prompt's tokens are guessed until the engine has counted them."""
        self._caller = caller
        self._charged = 0.0
        if isinstance(request.prompt, tuple):
            self._charge(len(request.prompt))
        else:
            texts = [str(message.get("content") or "") for message in request.messages or ()]
            self._charge(sum(len(text.encode()) for text in (request.prompt or "", *texts)) / _BYTES_PER_TOKEN)

    def piece(self) -> None:
        """One more piece of the answer, of a token at least."""
        self._charge(1)

    def total(self, tokens: int) -> None:
        """What prompt and answer had in all: the guess is put right."""
        self._charge(tokens - self._charged)

    def _charge(self, tokens: float) -> None:
        self._charged += tokens
        if self._caller is not None:
            self._caller.charge(tokens)


current: ContextVar[Caller | None] = ContextVar("current", default=None)
