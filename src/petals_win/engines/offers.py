"""A model before it is loaded: its name, its context, and what it would take of this PC. Knows which engines can tell that."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from petals_win.engines.base import Engine, ModelCard
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.host.imports import importing

# Those whose models this PC computes alone. All others are small here, or hold what nobody but them can tell of.
_TELLING = ("local", "onnx")


@dataclass(frozen=True)
class Offer:
    """What an engine would answer with.

    engine: its name. cards: its models, before loading. open: loads them; blocks, on a thread without an event loop.
    unloads: whether it may be unloaded, and loaded again; if so,
    takes: bytes, by device as torch calls it, of weights and one long conversation. alone_on: a device whose free memory nobody can
    tell, so that one model at a time is there. promised: what its answers may still come to take, in the same form.
    """

    engine: str
    cards: tuple[ModelCard, ...]
    open: Callable[[], Engine]
    unloads: bool = False
    takes: Mapping[str, int] = field(default_factory=dict)
    alone_on: str | None = None
    promised: Callable[[Engine], Mapping[str, int]] = lambda _engine: {}


def can_unload(engine: str) -> bool:
    """Whether the engine of that name can tell what it would load, so that it may be unloaded."""
    return engine in _TELLING


def look(engine: str, settings: EngineSettings) -> Offer:
    """What the engine of that name, for which `can_unload` holds, would load. Raises UserError for what it could not."""
    find_engine(engine)  # all its imports, before anything is loaded that shall be let go again
    with importing():
        return importlib.import_module(f"petals_win.engines.{engine}").offer(settings)
