"""GET /v1/swarm and its events: who serves which blocks. Knows the engine protocol and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.types import Receive, Scope, Send

from petals_win.api import reply_schemas as sent
from petals_win.api.errors import ApiError
from petals_win.api.generations import Generations
from petals_win.api.streaming import Stream, json_event
from petals_win.engines.base import Engine

LOOK_S = 1.0  # between two looks at what the engine knows
MOST_LISTENERS = 32


def swarm_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What programs that watch a swarm ask for."""
    router = APIRouter()
    listeners: set[object] = set()

    @router.get("/v1/swarm", response_model=sent.Swarm, responses=sent.errors(401, 403, 500))
    async def swarm() -> dict[str, Any]:
        """Every block with the PCs that serve it, the blocks that nobody serves, the PCs, and the engines with their models."""
        return _state(engine)

    @router.get(
        "/v1/swarm/events",
        status_code=200,
        response_class=Stream,
        responses=sent.errors(401, 403, 429, 500) | sent.events_of(sent.Swarm, "The state, as /v1/swarm has it."),
    )
    async def swarm_events() -> Stream:
        """The whole state as a server-sent event, at once and whenever it changes."""
        if len(listeners) >= MOST_LISTENERS:
            raise ApiError(
                429,
                f"{len(listeners)} programs listen to the swarm already. Ask for /v1/swarm from time to time instead.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "30"},
            )
        return _Listened(_changes(engine, generations.stopping), listeners)

    return router


class _Listened(Stream):
    """Server-sent events with a place among the listeners, from the moment in which they are made to their end."""

    def __init__(self, events: AsyncGenerator[bytes, None], listeners: set[object]):
        super().__init__(events)
        self._listeners = listeners
        listeners.add(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._listeners.discard(self)


async def _changes(engine: Engine, stopping: asyncio.Event) -> AsyncGenerator[bytes, None]:
    before = None
    while not stopping.is_set():
        now = _state(engine)
        if now != before:
            yield json_event(now, "swarm")
            before = now
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), LOOK_S)


def _state(engine: Engine) -> dict[str, Any]:
    status = engine.status()
    missing = set(status.missing_blocks)
    blocks = [
        {
            "block": block,
            "peer_ids": [peer.peer_id for peer in status.peers if peer.start_block <= block < peer.end_block],
            "missing": block in missing,
        }
        for block in range(status.num_blocks)
    ]
    # An engine has one swarm, that of its model; workers have several models, or none before the first one is there.
    of_swarm = (name for each in status.engines if each.peers or each.missing_blocks for name in each.models)
    model = next(of_swarm, None) or next((card.id for card in engine.models()), "")
    return {"object": "swarm", "model": model, **asdict(status), "blocks": blocks}
