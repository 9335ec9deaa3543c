"""Keys and values of one session, in memory that grows in pieces as tokens come.

Knows transformers' Cache protocol, by which a decoder's layers store and read keys and values. Does not know models.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_OWN_PAGES = 2**16  # bytes from which a tensor gets pages of its own


@dataclass(frozen=True)
class KvShape:
    """What one block keeps for one token of one sequence."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    window: int | None  # of the block's sliding window, in tokens; None: it sees all
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return (self.key_heads * self.key_size + self.value_heads * self.value_size) * self.dtype.itemsize


class SessionCache(Cache):
    """The State (state.py) of a run of blocks. `position` is the number of tokens that it holds; the caller advances it.

    Layers pass their absolute index to `update`; everything that a decoder asks about a layer counts from the first of
    this run, as the decoder's own loop does.
    """

    truncates: ClassVar[bool] = True

    def __init__(
        self, shapes: Sequence[KvShape], first: int, batch_size: int, capacity: int, device: torch.device
    ) -> None:
        """Allocate `capacity` tokens for each of the blocks first, first + 1, …

        Raises RuntimeError (torch's) if the device's memory does not suffice.
        """
        self.position = 0
        self.capacity = capacity
        self._first = first
        self._made_of = list(shapes), first, batch_size
        self._device = device
        super().__init__(layers=[_Slots(self, shape, batch_size, capacity, device) for shape in shapes])

    @property
    def nbytes(self) -> int:
        shapes, _, batch_size = self._made_of
        return batch_size * self.capacity * sum(shape.bytes_per_token for shape in shapes)

    def truncate(self, position: int) -> None:
        """What is behind the position is never read, so nothing else has to be undone."""
        self.position = position

    def fork(self, position: int, capacity: int) -> SessionCache:
        other = SessionCache(*self._made_of, capacity, self._device)
        pairs: Any = zip(self.layers, other.layers, strict=True)
        for ours, theirs in pairs:
            theirs.keys[:, :, :position] = ours.keys[:, :, :position]
            theirs.values[:, :, :position] = ours.values[:, :, :position]
        other.position = position
        return other

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all; less than there is changes nothing.

        What is held is copied, block by block, so that one block's old memory is the most that is held twice. Raises
        RuntimeError (torch's) if the device's memory does not suffice; what was held is held still.
        """
        if capacity <= self.capacity:
            return
        self._resize(capacity)

    def shrink(self, capacity: int) -> None:
        """Copied block by block, too. After an error the blocks differ."""
        if capacity < self.capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        for layer in self.layers:
            slots: Any = layer
            slots.resize(capacity)
        self.capacity = capacity

    def free(self) -> None:
        """Let go of the memory at once: cache and blocks refer to each other, so that Python would find it only some time."""
        for layer in self.layers:
            slots: Any = layer
            slots.keys = slots.values = None

    def fill(self, tokens: int, chance: torch.Generator) -> None:
        """Hold so many tokens of random keys and values."""
        for layer in self.layers:
            slots: Any = layer
            for held in (slots.keys, slots.values):
                rows, heads, _, size = held.shape
                held[:, :, :tokens] = torch.randn(rows, heads, tokens, size, generator=chance)
        self.position = tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots: Any = self.layers[layer_idx - self._first]
        return slots.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i of each layer continue what row rows[i] (int64, [batch]) held."""
        for layer in self.layers:
            layer.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


class _Slots(CacheLayerMixin):
    """Keys and values of one block: [batch, heads, capacity, size] each, filled up to the owner's position."""

    def __init__(
        self, owner: SessionCache, shape: KvShape, batch_size: int, capacity: int, device: torch.device
    ) -> None:
        super().__init__()
        self._owner = owner
        self.window = shape.window
        self.is_sliding = shape.window is not None
        self.keys = _memory(batch_size, shape.key_heads, capacity, shape.key_size, shape.dtype, device)
        self.values = _memory(batch_size, shape.value_heads, capacity, shape.value_size, shape.dtype, device)
        self.is_initialized = True

    def resize(self, capacity: int) -> None:
        assert self.keys is not None and self.values is not None
        self.keys = self._resized(self.keys, capacity)
        self.values = self._resized(self.values, capacity)

    def _resized(self, held: torch.Tensor, capacity: int) -> torch.Tensor:
        batch_size, heads, old, size = held.shape
        if old == capacity:  # as after a growth that failed half-way
            return held
        resized, end = _memory(batch_size, heads, capacity, size, held.dtype, held.device), self._owner.position
        resized[:, :, :end] = held[:, :, :end]
        return resized

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the memory was allocated at the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        start = self._owner.position
        end = start + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        first = self._first_visible()
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` for one token of one sequence, [1, heads, size], in fewer operations."""
        assert self.keys is not None and self.values is not None
        position = self._owner.position
        self.keys.select(2, position).copy_(key)
        self.values.select(2, position).copy_(value)
        first = self._first_visible()
        length = position + 1 - first
        return self.keys.narrow(2, first, length), self.values.narrow(2, first, length)

    def _first_visible(self) -> int:
        return 0 if self.window is None else max(self._owner.position - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self._owner.position + query_length - first, first

    def get_seq_length(self) -> int:
        return self._owner.position

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None
        end = self._owner.position
        for held in (self.keys, self.values):
            held[:, :, :end] = held[:, :, :end].index_select(0, beam_idx.to(held.device))


def _memory(
    batch_size: int, heads: int, capacity: int, size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor [batch, heads, capacity, size] of whatever values, whose memory goes back to the system with it.

    C's allocator keeps most of what sessions of different lengths free, in gaps between what others still use.
    """
    shape = (batch_size, heads, capacity, size)
    nbytes = batch_size * heads * capacity * size * dtype.itemsize
    if device.type != "cpu" or nbytes < _OWN_PAGES:
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        pages = (
            mmap.mmap(-1, nbytes)
            if sys.platform == "win32"
            else mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
    except OSError as e:
        raise RuntimeError(f"The system has no {nbytes} bytes of memory left") from e
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class _Recorded(Exception):
    """Ends a forward pass as soon as a block has shown what it keeps."""


class ShapeRecorder(Cache):
    """Learns the shape of what a single block stores, from its first call of `update`."""

    def __init__(self, window: int | None) -> None:
        super().__init__(layers=[])
        self._window = window
        self.shape: KvShape | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, key_heads, _, key_size = key_states.shape
        _, value_heads, _, value_size = value_states.shape
        self.shape = KvShape(key_heads, key_size, value_heads, value_size, self._window, key_states.dtype)
        raise _Recorded

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    recorded = _Recorded
