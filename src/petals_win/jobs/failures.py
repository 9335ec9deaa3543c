"""What a call can end by, and how an error travels from a worker to an API. Knows the errors of the engine protocol."""

from __future__ import annotations

from typing import Any

from petals_win.engines.base import (
    ContextTooLong,
    EngineClosed,
    Full,
    ModelNotFound,
    SwarmFailed,
    SwarmFull,
    SwarmRefused,
    SwarmUnavailable,
)
from petals_win.errors import UserError, printable

_MOST_DETAILS = 4096  # numbers or names beside a sentence


class BadMessage(UserError):
    """The other side has sent what makes no sense. The sentence says what, never the value."""


class LinkLost(UserError):
    """The other side cannot be reached, or not any more."""


class LinkRefused(LinkLost):
    """The other side does not let this one in: it has another key, another certificate or another protocol."""


class Draining(UserError):
    """The worker is ending and takes no new questions."""

    def __init__(self) -> None:
        super().__init__("This worker is ending, and takes no new questions.")


class WorkerFailed(SwarmFailed):
    """A worker failed at an answer, by a defect or because it has gone. `sentence` is for people."""

    def __init__(self, sentence: str):
        UserError.__init__(self, sentence)


class NoWorker(SwarmUnavailable):
    """No worker can answer now; `sentence` says what they say."""

    def __init__(self, sentence: str):
        UserError.__init__(self, sentence)
        self.missing_blocks = ()


# The first that fits counts: derived classes stand before those that they are derived from.
_KINDS: tuple[tuple[str, type[UserError]], ...] = (
    ("model_not_found", ModelNotFound),
    ("context_too_long", ContextTooLong),
    ("closed", EngineClosed),
    ("draining", Draining),
    ("swarm_full", SwarmFull),
    ("full", Full),
    ("swarm_refused", SwarmRefused),
    ("failed", WorkerFailed),
    ("swarm_failed", SwarmFailed),
    ("swarm_unavailable", SwarmUnavailable),
    ("protocol", LinkRefused),
    ("refused", UserError),
)


def put_error(message: Any, error: UserError) -> None:
    """Write an error into a message of the type Error."""
    message.kind = next(kind for kind, error_type in _KINDS if isinstance(error, error_type))
    message.sentence = printable(str(error))
    match error:
        case ContextTooLong():
            message.numbers.extend((error.prompt_tokens, error.context_length))
        case SwarmUnavailable():
            message.numbers.extend(error.missing_blocks[:_MOST_DETAILS])
        case ModelNotFound():
            message.names.append(printable(error.model))


def error_in(message: Any) -> UserError:
    """The error that a message of the type Error tells; one of a kind that is not known is a refusal."""
    kind, numbers = message.kind, tuple(message.numbers[:_MOST_DETAILS])
    if kind == "context_too_long" and len(numbers) == 2:
        return ContextTooLong(*numbers)
    if kind == "closed":
        return EngineClosed()
    if kind == "draining":
        return Draining()
    error_type = dict(_KINDS).get(kind, UserError)
    error = error_type.__new__(error_type)
    UserError.__init__(error, printable(message.sentence) or "The worker gave no reason.")
    if isinstance(error, ModelNotFound):
        error.model = message.names[0] if message.names else ""
    if isinstance(error, SwarmUnavailable):
        error.missing_blocks = numbers
    return error
