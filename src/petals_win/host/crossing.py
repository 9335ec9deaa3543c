"""Calls that cross from one thread to the event loop of another: those that set out together arrive together.

Waking a loop takes a system call, in which this thread may lose the interpreter to the loop that it has just woken; that one then
looks after the first of eight sessions while the others are still on their way. Knows threads and event loops. Does not know what is called.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_Call = tuple[Callable[..., object], tuple[Any, ...]]


class _Leaving(threading.local):
    """The calls of this thread that have not set out, by where they go."""

    def __init__(self) -> None:
        self.calls: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
        self.by: asyncio.AbstractEventLoop | None = None  # whose turn they wait for
        self.gathering = False


_leaving = _Leaving()


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Let the loop call it, from any thread.

    From an event loop it sets out at the end of this turn of that loop, with all others. A loop that is closed by then calls nothing.
    """
    _leaving.calls.setdefault(loop, []).append((function, args))
    if _leaving.gathering:
        return
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        set_out()
    else:
        if _leaving.by is not here:
            _leaving.by = here
            here.call_soon(set_out)


@contextmanager
def together() -> Iterator[None]:
    """In a thread without an event loop: all calls of this context set out at its end."""
    before, _leaving.gathering = _leaving.gathering, True
    try:
        yield
    finally:
        _leaving.gathering = before
        set_out()


def set_out() -> None:
    """Send off what this thread has gathered; whoever is about to block has to."""
    calls, _leaving.calls, _leaving.by = _leaving.calls, {}, None
    for loop, waiting in calls.items():
        with suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(_arrive, waiting)


def _arrive(calls: list[_Call]) -> None:
    loop = asyncio.get_running_loop()
    for function, args in calls:
        loop.call_soon(function, *args)
