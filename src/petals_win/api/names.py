"""Further names for the models of an engine. Knows names only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from petals_win.engines.base import Engine, ModelCard


def with_names(engine: Engine, aliases: Sequence[str], any_model: bool) -> Engine:
    """The engine, with cards that know the further names: those of its first model, or all names if it has one alone."""
    return cast(Engine, _Named(engine, tuple(aliases), any_model)) if aliases or any_model else engine


class _Named:
    """Everything but the cards is the engine's own."""

    def __init__(self, engine: Engine, aliases: tuple[str, ...], any_model: bool):
        self._engine, self._aliases, self._any_model = engine, aliases, any_model

    def models(self) -> list[ModelCard]:
        cards = self._engine.models()
        alone = len(cards) == 1
        return [
            replace(card, aliases=self._aliases if number == 0 else (), any_name=self._any_model and alone)
            for number, card in enumerate(cards)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
