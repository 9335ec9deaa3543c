"""What a block keeps of a session that does not grow with it: linear attention's matrix, Mamba's state, a convolution's window.

Such a state cannot be cut at a token, so it is held as it was at several positions. Knows transformers' protocol for the caches of
such blocks. Does not know models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from petals_win.span.memory import allocate

# Before the newest pass, after it, and where a later session may go on from.
COPIES = 3

Kind = Literal["conv", "recurrent"]
Held = dict[tuple[Kind, int], torch.Tensor]


@dataclass(frozen=True)
class StateShape:
    """One tensor that a block keeps of one sequence, of whatever length. A convolution's last dimension is tokens."""

    kind: Kind
    number: int  # among those of its kind in the block
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


class Owner(Protocol):
    """The cache that the states of a block belong to."""

    position: int
    kept: int | None  # the position at which states are to be kept when a pass begins there


class States(LinearAttentionCacheLayerMixin):
    """All states of one block, [batch, *size] each. A block without any may have one of these, too.

    A pass reads what was before it and writes beside that, so a pass that failed leaves nothing to be undone: until the owner's
    position moves on, the next one begins where it began. At position 0 there is no state.
    """

    def __init__(self, owner: Owner, shapes: Sequence[StateShape], batch_size: int, device: torch.device) -> None:
        super().__init__()
        self._owner_of_states = owner
        self._state_shapes, self._batch_size, self._state_device = tuple(shapes), batch_size, device
        self._before, self._after = self._allocated(), self._allocated()
        self._began = 0  # where the newest pass did: `_before` is of this position, `_after` of the one that followed
        self._kept: tuple[int, Held] | None = None

    def _allocated(self) -> Held:
        return {
            (shape.kind, shape.number): allocate((self._batch_size, *shape.size), shape.dtype, self._state_device)
            for shape in self._state_shapes
        }

    @property
    def nbytes(self) -> int:
        held = [self._before, self._after, *([self._kept[1]] if self._kept is not None else [])]
        return sum(tensor.nbytes for copy in held for tensor in copy.values())

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: the memory was allocated at the start."""

    def get_conv_state(self, number: int = 0) -> torch.Tensor | None:
        """What is before the pass, to be changed in place into what is after it; None at the beginning."""
        return self._to_change("conv", number)

    def get_recurrent_state(self, number: int = 0) -> torch.Tensor | None:
        """As get_conv_state: some kernels change it in place."""
        return self._to_change("recurrent", number)

    def _to_change(self, kind: Kind, number: int) -> torch.Tensor | None:
        self._begin()
        if self._began == 0:
            return None
        return self._after[kind, number].copy_(self._before[kind, number])

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Returns the window before the pass and, behind it, the inputs [batch, channels, tokens] of the pass."""
        self._begin()
        after = self._after["conv", state_idx]
        full = conv_states
        if self._began > 0:
            full = torch.cat([self._before["conv", state_idx], conv_states], dim=-1)
        elif (missing := after.shape[-1] - conv_states.shape[-1]) > 0:
            full = torch.nn.functional.pad(conv_states, (missing, 0))
        after.copy_(full[..., -after.shape[-1] :])
        return full

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._begin()
        return self._after["recurrent", state_idx].copy_(recurrent_states)

    def _begin(self) -> None:
        """Whatever is called first in a pass."""
        position = self._owner_of_states.position
        if position == self._began:
            return
        self._before, self._after = self._after, self._before
        self._began = position
        if position == self._owner_of_states.kept and (self._kept is None or self._kept[0] != position):
            kept = self._kept[1] if self._kept is not None else self._allocated()
            _copy(self._before, kept)
            self._kept = position, kept

    def leads_back_to(self, position: int) -> bool:
        return position == 0 or not self._state_shapes or self._at(position) is not None

    def _at(self, position: int) -> Held | None:
        if position == self._began:
            return self._before
        if position == self._owner_of_states.position:
            return self._after
        return self._kept[1] if self._kept is not None and position == self._kept[0] else None

    def go_back(self, position: int) -> None:
        """Called before the owner's position moves back to one that `leads_back_to` agreed to."""
        held = self._at(position)
        if position > 0 and held is not None and self._kept is not None and held is self._kept[1]:
            _copy(held, self._before)
            self._began = position

    def take_from(self, other: Any) -> None:
        """What the other one holds for the owner's position, which `leads_back_to` of the other one agreed to."""
        position = self._owner_of_states.position
        if position == 0 or not self._state_shapes:
            return
        held: Held | None = other._at(position)
        assert held is not None
        _copy(held, self._before)
        self._began = position

    def resize(self, capacity: int) -> None:
        """As long as a session goes on; it takes the same whatever its length is."""

    def settle(self) -> None:
        """Hold only what is at the owner's position: nothing is computed any more, only copied."""
        position = self._owner_of_states.position
        held = self._at(position)
        assert held is not None or not self._state_shapes
        self._before, self._began = held or {}, position
        self._after, self._kept = {}, None

    def fill(self, chance: torch.Generator) -> None:
        """Hold random numbers at the owner's position."""
        self._began = self._owner_of_states.position
        for tensor in self._before.values():
            tensor.copy_(torch.randn(tensor.shape, generator=chance))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for copy in (self._before, self._after):
            for tensor in copy.values():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        self._kept = None

    def free(self) -> None:
        self._before, self._after, self._kept = {}, {}, None


def _copy(source: Held, target: Held) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
