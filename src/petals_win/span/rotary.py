"""Rotary tables that depend on how long a text is, made for the length that its session has declared.

Such a table is another one for a long text than for a short one, from the first position on. Made for what a step happens to reach, it
would change within a text: what was kept before would not fit what comes, and chunks would not give what the whole gives. Knows
transformers' rotary modules. Does not know sessions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_BY_LENGTH = ("longrope", "dynamic")


class DeclaredRotary(nn.Module):
    """Around a decoder's rotary module: it makes its tables as if a text had its last token at the declared length."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.declared: int | None = None  # tokens; None: the table is for what the positions reach

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Cosines and sines [batch, tokens, size] for positions [batch, tokens]."""
        if position_ids.is_meta:  # there is no length, and it does not matter
            return inspect.unwrap(type(self.rotary).forward)(self.rotary, hidden, position_ids, *args, **kwargs)
        if self.declared is None:
            return self.rotary(hidden, position_ids, *args, **kwargs)
        for name in vars(self.rotary):
            # Or a table that was made for a longer text would be taken.
            if name.endswith("max_seq_len_cached"):
                setattr(self.rotary, name, 0)
        last = position_ids.new_full((*position_ids.shape[:-1], 1), self.declared - 1)
        cos, sin = self.rotary(hidden, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]

    def table_for(self, declared: int) -> int:
        """Equal for lengths that have the same table; 0 for that of short texts."""
        tables = [each for each in _tables(self.rotary) if each["rope_type"] in _BY_LENGTH]
        over = [each for each in tables if declared > self._short(each)]
        if not over:
            return 0
        return declared if any(each["rope_type"] == "dynamic" for each in over) else 1

    def _short(self, table: dict[str, Any]) -> int:
        """Up to how many tokens a text is short."""
        return table.get("original_max_position_embeddings") or self.rotary.config.max_position_embeddings


def depends_on_length(module: nn.Module | None) -> bool:
    """Whether this is a rotary module with a table that depends on how long a text is."""
    return any(table["rope_type"] in _BY_LENGTH for table in _tables(module))


@contextmanager
def declared(modules: Iterable[DeclaredRotary], tokens: int) -> Iterator[None]:
    """Meanwhile their tables are made for texts of so many tokens."""
    made = list(modules)
    for module in made:
        module.declared = tokens
    try:
        yield
    finally:
        for module in made:
            module.declared = None


def _tables(module: Any) -> list[dict[str, Any]]:
    """The settings of its tables: of one, or of one for each kind of blocks."""
    if not hasattr(module, "rope_type"):
        return []
    given: dict[str, Any] = getattr(module.config, "rope_parameters", None) or {}
    return [each for each in (given, *given.values()) if isinstance(each, dict) and "rope_type" in each]
