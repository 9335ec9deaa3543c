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

from petals_win.span.state import CannotTruncate

_OWN_PAGES = 2**16  # bytes from which a tensor gets pages of its own
# A block with a window keeps so many tokens more, so that these can be taken back, and has room for so many new ones, each time
# before those that it has let go are moved out of the way. No more tokens may come at once.
BEYOND_WINDOW, ROOM_BEYOND = 128, 512


@dataclass(frozen=True)
class KvShape:
    """What one block keeps for one token of one sequence."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    window: int | None  # of the block's sliding window, in tokens; None: it sees all
    dtype: torch.dtype
    chunked: bool = False  # whether the window does not slide: it begins anew every so many tokens

    @property
    def bytes_per_token(self) -> int:
        return (self.key_heads * self.key_size + self.value_heads * self.value_size) * self.dtype.itemsize

    def tokens_kept(self, tokens: int) -> int:
        """For how many of so many tokens memory is needed."""
        return tokens if self.window is None else min(tokens, self.window + BEYOND_WINDOW + ROOM_BEYOND)

    def bytes_of(self, tokens: int) -> int:
        """What a block keeps of a sequence of so many tokens."""
        return self.bytes_per_token * self.tokens_kept(tokens)


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
        return batch_size * sum(shape.bytes_of(self.capacity) for shape in shapes)

    def truncate(self, position: int) -> None:
        """What is behind the position is never read, so nothing else has to be undone.

        Raises CannotTruncate where a block has let go of what its window reaches back to from there.
        """
        self._check_held(position)
        self.position = position

    def fork(self, position: int, capacity: int) -> SessionCache:
        self._check_held(position)
        other = SessionCache(*self._made_of, capacity, self._device)
        other.position = position
        pairs: Any = zip(self.layers, other.layers, strict=True)
        for ours, theirs in pairs:
            theirs.take_from(ours)
        return other

    def _check_held(self, position: int) -> None:
        layers: Any = self.layers
        if not all(slots.leads_back_to(position) for slots in layers):
            raise CannotTruncate(f"Of {self.position} tokens, the windows of blocks have left what {position} need")

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
        self.position = tokens
        for layer in self.layers:
            slots: Any = layer
            slots.fill(chance)

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
    """Keys and values of one block: [batch, heads, slots, size] each, of the tokens from `_first` up to the owner's position.

    With a window, tokens are let go that it has left behind: where the slots end, those that are kept are moved to the beginning.
    """

    def __init__(
        self, owner: SessionCache, shape: KvShape, batch_size: int, capacity: int, device: torch.device
    ) -> None:
        super().__init__()
        self._owner = owner
        self._shape = shape
        self.window, self.chunked = shape.window, shape.chunked
        self.is_sliding = shape.window is not None
        slots = shape.tokens_kept(capacity)
        self.keys = _memory(batch_size, shape.key_heads, slots, shape.key_size, shape.dtype, device)
        self.values = _memory(batch_size, shape.value_heads, slots, shape.value_size, shape.dtype, device)
        self._first = 0
        self.is_initialized = True

    def resize(self, capacity: int) -> None:
        assert self.keys is not None and self.values is not None
        slots = self._shape.tokens_kept(capacity)
        if self._owner.position - self._first > slots:
            self._let_go(self._owner.position)
        self.keys = self._resized(self.keys, slots)
        self.values = self._resized(self.values, slots)

    def _resized(self, held: torch.Tensor, slots: int) -> torch.Tensor:
        batch_size, heads, old, size = held.shape
        if old == slots:  # as after a growth that failed half-way
            return held
        resized, end = _memory(batch_size, heads, slots, size, held.dtype, held.device), self._end
        resized[:, :, :end] = held[:, :, :end]
        return resized

    @property
    def _end(self) -> int:
        """Of the slots that are filled."""
        return self._owner.position - self._first

    def leads_back_to(self, position: int) -> bool:
        """Whether all is held that the token behind the first `position` ones sees."""
        return self._first <= self._first_visible(position)

    def take_from(self, other: _Slots) -> None:
        """What the other one holds of the tokens before the owner's position, which may be before the other's."""
        assert (
            self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        )
        end = self._owner.position
        self._first = max(other._first, end - self.keys.shape[2])
        count, begin = end - self._first, self._first - other._first
        self.keys[:, :, :count] = other.keys[:, :, begin : begin + count]
        self.values[:, :, :count] = other.values[:, :, begin : begin + count]

    def fill(self, chance: torch.Generator) -> None:
        """Hold random keys and values of as many tokens as the owner says."""
        assert self.keys is not None and self.values is not None
        self._first = max(0, self._owner.position - self.keys.shape[2])
        for held in (self.keys, self.values):
            rows, heads, _, size = held.shape
            held[:, :, : self._end] = torch.randn(rows, heads, self._end, size, generator=chance)

    def _let_go(self, position: int) -> None:
        """Of all tokens before that, keep what the window sees, and some more, at the beginning of the slots."""
        assert self.window is not None and self.keys is not None and self.values is not None
        first = max(self._first, position - self.window - BEYOND_WINDOW + 1)
        begin, end = first - self._first, position - self._first
        for held in (self.keys, self.values):
            held[:, :, : end - begin] = held[:, :, begin:end].clone()  # they may overlap
        self._first = first

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the memory was allocated at the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        start = self._owner.position
        end = start + key_states.shape[-2]
        if end - self._first > self.keys.shape[2]:
            self._let_go(start)
        first = self._first_visible(start) - self._first
        start, end = start - self._first, end - self._first
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` for one token of one sequence, [1, heads, size], in fewer operations."""
        assert self.keys is not None and self.values is not None
        position = self._owner.position
        if position - self._first == self.keys.shape[2]:
            self._let_go(position)
        slot, first = position - self._first, self._first_visible(position) - self._first
        self.keys.select(2, slot).copy_(key)
        self.values.select(2, slot).copy_(value)
        return self.keys.narrow(2, first, slot + 1 - first), self.values.narrow(2, first, slot + 1 - first)

    def _first_visible(self, position: int) -> int:
        """Of the tokens, the first one that the one behind `position` others sees."""
        if self.window is None:
            return 0
        if self._shape.chunked:
            return position - position % self.window
        return max(position - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible(self._owner.position)
        return self._owner.position + query_length - first, first

    def get_seq_length(self) -> int:
        return self._owner.position

    def get_max_length(self) -> int:
        return self._owner.capacity

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None
        end = self._end
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

    def __init__(self, window: int | None, chunked: bool = False) -> None:
        super().__init__(layers=[])
        self._window, self._chunked = window, chunked
        self.shape: KvShape | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, key_heads, _, key_size = key_states.shape
        _, value_heads, _, value_size = value_states.shape
        self.shape = KvShape(
            key_heads, key_size, value_heads, value_size, self._window, key_states.dtype, self._chunked
        )
        raise _Recorded

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    recorded = _Recorded
