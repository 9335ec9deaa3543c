"""What an engine raises, as OpenAI's clients see it."""

from __future__ import annotations

import pytest

from petals_win.api.errors import from_engine
from petals_win.engines.base import (
    ContextTooLong,
    EngineClosed,
    Full,
    SwarmFailed,
    SwarmFull,
    SwarmRefused,
    SwarmUnavailable,
)


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (SwarmFull("All 12 MiB are taken."), 503, "swarm_full", "The swarm is full: All 12 MiB are taken. Try again"),
        (Full("All is taken. Try again in a moment."), 503, "full", "All is taken. Try again in a moment."),
        (SwarmFailed("the cable is loose."), 503, "swarm_unavailable", "failed, and no other could take its place"),
        (SwarmUnavailable(()), 503, "swarm_unavailable", "no reachable PC"),
        (SwarmRefused("Too long."), 400, None, "A PC of the swarm refused the request: Too long."),
        (ContextTooLong(7, 5), 400, "context_length_exceeded", "7 tokens"),
    ],
)
def test_what_an_engine_raises(error, status, code, words):
    translated = from_engine(error)
    assert (translated.status, translated.code) == (status, code)
    assert words in str(translated)
    assert ("Retry-After" in translated.headers) == (status == 503)


def test_an_engine_that_ends():
    """No use to come back soon, so no time is named."""
    translated = from_engine(EngineClosed())
    assert (translated.status, translated.code, dict(translated.headers)) == (503, "shutting_down", {})


def test_what_is_no_fault_of_the_request_is_kept_in_the_log(caplog):
    error = SwarmUnavailable([2, 3])
    error.__cause__ = ConnectionError("the cable is loose")
    from_engine(error)
    assert "status 503" in caplog.text and "blocks 2:4" in caplog.text and "the cable is loose" in caplog.text
    caplog.clear()
    from_engine(SwarmRefused("Too long."))
    assert not caplog.text
