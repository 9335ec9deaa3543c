"""Which engine answers where the user named none: what fits this PC is not split.

Knows what the user asked for and what this PC has free. Does not open an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from petals_win.engines.registry import AUTO, EngineSettings
from petals_win.errors import UserError
from petals_win.host.imports import importing


@dataclass(frozen=True)
class Choice:
    """The name of an engine, and why it is that one, as the end of a sentence."""

    name: str
    why: str


def choose_engine(asked: str, settings: EngineSettings) -> Choice:
    """The engine that was asked for, or for "auto" the one that suits.

    Raises UserError if none does: no swarm is named, and the model does not fit into this PC.
    """
    if asked != AUTO:
        return Choice(asked, "as asked for")
    if settings.peers:
        return Choice("petals", "since --peers names a swarm")
    with importing():
        from petals_win.engines.local import whole_model_here
        from petals_win.models.onnx_folder import is_onnx_folder

    if is_onnx_folder(settings.model):
        return Choice("onnx", "since the model was converted for it")
    here = whole_model_here(settings)
    if here.fits:
        return Choice("local", f"since {here.source.name} fits into this PC and no --peers name a swarm: {here.sizes}")
    raise UserError(
        f"{here.source.name} does not fit into this PC alone: {here.sizes}. Start 'petals-win serve' with the same --model on "
        "several PCs, and give --peers with the address that it prints."
    )
