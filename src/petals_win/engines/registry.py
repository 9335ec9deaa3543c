"""The engines that there are, by name: our own, and those of other packages, by the entry points of `GROUP`.

Knows names and how what is behind them is found. Imports no engine before it is wanted.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

from petals_win.engines.base import Engine
from petals_win.errors import UserError
from petals_win.host.imports import importing

logger = logging.getLogger(__name__)

GROUP = "petals_win.engines"
AUTO = "auto"

# As in pyproject.toml, so that they are there in a checkout whose installation is older than itself.
_OURS = {
    "command": "petals_win.engines.command:open_engine",
    "local": "petals_win.engines.local:open_engine",
    "openai": "petals_win.engines.openai:open_engine",
    "onnx": "petals_win.engines.onnx:open_engine",
    "petals": "petals_win.engines.petals:open_engine",
}


@dataclass(frozen=True)
class EngineSettings:
    """What the user asked of an engine: a model, the swarm that it is in, and a token for the Hugging Face hub.

    `device`, `dtype` and `quant` are for an engine that computes blocks on this PC, each None where the user left it to us.
    `base_url` and `upstream_key` are of another server that computes; with it, an empty `model` means all that it has.
    """

    model: str
    peers: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)
    device: str | None = None
    dtype: str | None = None
    quant: str | None = None
    base_url: str | None = None
    upstream_key: str | None = field(default=None, repr=False)

    def for_blocks(self) -> list[str]:
        """The options that the user gave of those that say how blocks are computed, and where."""
        options = {"--peers": self.peers, "--device": self.device, "--dtype": self.dtype, "--quant": self.quant}
        return [name for name, value in options.items() if value]


# What an entry point names. Takes its time, in a thread without an event loop: when it returns, the model is loaded.
# Raises UserError for settings that the engine cannot do anything with.
OpenEngine = Callable[[EngineSettings], Engine]


def check_engine_name(name: str) -> None:
    """Raises UserError, which says what there is, for the name of no engine; "auto" leaves the choice to petals-win."""
    if name not in (names := engine_names()):
        raise UserError(f"There is no engine {name!r}. Use one of: {', '.join(names)}.")


def engine_names() -> list[str]:
    """All that --engine takes."""
    return [AUTO, *sorted(_entry_points())]


def find_engine(name: str) -> OpenEngine:
    """What opens the engine of that name, of which `check_engine_name` must not have said that there is none.

    Raises UserError if its package cannot be imported.
    """
    found = _entry_points()
    try:
        with importing():
            return found[name].load()
    except Exception as e:
        if name in _OURS:
            raise  # a defect, and no matter of the user's
        raise UserError(
            f"The engine {name!r} cannot be loaded from {found[name].value}: {e}. Update or remove its package."
        ) from e


def _entry_points() -> dict[str, EntryPoint]:
    ours = {name: EntryPoint(name, value, GROUP) for name, value in _OURS.items()}
    others = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    for name in ours.keys() & others.keys():
        if others[name].value != ours[name].value:
            logger.warning(
                "The engine %r of %s is passed over: that is the name of one of ours", name, others[name].value
            )
    return others | ours
