"""What a run of blocks keeps of one session: keys and values in memory that grows in pieces as tokens come, and recurrent states.

Knows transformers' Cache protocol, by which a decoder's layers store and read keys and values. Does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from petals_win.errors import UserError
from petals_win.span.kv_int8 import packed, packed_bytes, unpacked, unpacked_size
from petals_win.span.memory import allocate
from petals_win.span.recurrent import COPIES, Kind, States, StateShape
from petals_win.span.state import CannotTruncate

# A block with a window keeps so many tokens more, so that these can be taken back, and has room for so many new ones, each time
# before those that it has let go are moved out of the way. No more tokens may come at once.
BEYOND_WINDOW, ROOM_BEYOND = 128, 512
# Tokens of a session for which a plan counts its states once.
USUAL_TOKENS = 4096


@dataclass(frozen=True)
class KvShape:
    """What one block keeps for one token of one sequence, and in `states` for all of its tokens together.

    A block without attention has no heads.
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    window: int | None  # of the block's sliding window, in tokens; None: it sees all
    dtype: torch.dtype
    states: tuple[StateShape, ...] = ()
    chunked: bool = False  # whether the window does not slide: it begins anew every so many tokens
    mark_size: int = 0  # of a key beside the others, by which the block chooses the tokens that it attends to
    times: int = 1  # that the block attends, with keys and values of its own each time; the same for all blocks
    in_int8: bool = False  # whether keys and values are kept in 8 bits (kv_int8.py)

    @property
    def attends(self) -> bool:
        return self.key_heads > 0

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of what is kept of a token."""
        return torch.int8 if self.in_int8 else self.dtype

    @property
    def rows(self) -> tuple[int, int]:
        """How many of them a head of keys is, and one of values."""
        sizes = self.key_size, self.value_size
        return (packed_bytes(sizes[0]), packed_bytes(sizes[1])) if self.in_int8 else sizes

    @property
    def state_bytes(self) -> int:
        """What it keeps of a sequence of any length."""
        return COPIES * sum(state.nbytes for state in self.states)

    @property
    def planned_bytes_per_token(self) -> int:
        """Where memory is planned for tokens of all sessions together: with a share of a usual session's states."""
        return self.bytes_per_token + -(-self.state_bytes // USUAL_TOKENS)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values."""
        key, value = self.rows
        numbers = self.key_heads * key + self.value_heads * value + self.mark_size
        return self.times * numbers * self.kept_dtype.itemsize

    def tokens_kept(self, tokens: int) -> int:
        """For how many of so many tokens memory is needed."""
        return tokens if self.window is None else min(tokens, self.window + BEYOND_WINDOW + ROOM_BEYOND)

    def bytes_of(self, tokens: int) -> int:
        """What a block keeps of a sequence of so many tokens."""
        return self.state_bytes + self.bytes_per_token * self.tokens_kept(tokens)


def in_int8(shapes: Sequence[KvShape], model_type: str) -> list[KvShape]:
    """The same, with keys and values in 8 bits. Raises UserError where blocks keep something else, too."""
    if any(shape.states or shape.mark_size for shape in shapes) or not any(shape.attends for shape in shapes):
        raise UserError(
            f"Blocks of the type {model_type} keep more of a conversation than keys and values, so that these cannot be kept in 8 bits. "
            "Leave --kv-cache-dtype out."
        )
    return [replace(shape, in_int8=shape.attends) for shape in shapes]


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
        self._first = first * shapes[0].times
        self._made_of = list(shapes), first, batch_size
        self._device = device
        self.has_states = any(shape.states for shape in shapes)
        self.kept: int | None = None
        self.places: Any = None  # what native.py derives from where keys and values lie, until they move
        super().__init__(
            layers=[_layer(self, shape, batch_size, capacity, device) for shape in shapes for _ in range(shape.times)]
        )

    @property
    def nbytes(self) -> int:
        layers: Any = self.layers
        return sum(layer.nbytes for layer in layers)

    def truncate(self, position: int) -> None:
        """Of keys and values, what is behind the position is never read, so nothing else has to be undone.

        Raises CannotTruncate where a block has let go of what its window reaches back to from there, or has no state of there.
        """
        self._check_held(position)
        layers: Any = self.layers
        for layer in layers:
            layer.go_back(position)
        self.position = position

    def keep(self, position: int) -> bool:
        if not self.has_states:
            return False
        self.kept = position
        return True

    def fork(self, position: int, capacity: int) -> SessionCache:
        self._check_held(position)
        other = SessionCache(*self._made_of, capacity, self._device)
        other.position = position
        pairs: Any = zip(self.layers, other.layers, strict=True)
        for ours, theirs in pairs:
            theirs.take_from(ours)
        return other

    def leads_to(self, position: int) -> bool:
        layers: Any = self.layers
        return 0 <= position <= self.position and all(layer.leads_back_to(position) for layer in layers)

    def _check_held(self, position: int) -> None:
        if not self.leads_to(position):
            raise CannotTruncate(f"Of {self.position} tokens, blocks have left behind what {position} need")

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
        for layer in self.layers:
            if isinstance(layer, States):
                layer.settle()
        if capacity < self.capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        self.places = None
        for layer in self.layers:
            slots: Any = layer
            slots.resize(capacity)
        self.capacity = capacity

    def free(self) -> None:
        """Let go of the memory at once: cache and blocks refer to each other, so that Python would find it only some time."""
        self.places = None
        for layer in self.layers:
            slots: Any = layer
            slots.free()

    def fill(self, tokens: int, chance: torch.Generator) -> None:
        """Hold so many tokens of random keys and values, and random states."""
        self.position = tokens
        for layer in self.layers:
            slots: Any = layer
            slots.fill(chance)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(layer_idx).update(key_states, value_states)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Takes [batch, tokens, size], and returns that of all tokens."""
        return self.layer(layer_idx).mark(indexer_key_states)

    def layer(self, layer_idx: int) -> Any:
        """What belongs to a layer, by its number in the whole model."""
        return self.layers[layer_idx - self._first]

    def states(self, layer_idx: int) -> States:
        """Of the block with this absolute index. Raises ValueError for one that keeps none."""
        layer = self.layer(layer_idx)
        if not isinstance(layer, States):
            raise ValueError(f"Block {layer_idx} keeps no recurrent state")
        return layer

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states(layer_idx).get_conv_state(state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self.states(layer_idx).update_conv_state(conv_states, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states(layer_idx).get_recurrent_state(state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self.states(layer_idx).update_recurrent_state(recurrent_states, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.position > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of the layer that counts so from the first of the run; of the first that attends, if that one does not."""
        attending = [layer for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin):
            return layer.get_mask_sizes(query_length)
        return attending[0].get_mask_sizes(query_length) if attending else (self.position + query_length, 0)

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
        key, value = shape.rows
        self.keys = allocate((batch_size, shape.key_heads, slots, key), shape.kept_dtype, device)
        self.values = allocate((batch_size, shape.value_heads, slots, value), shape.kept_dtype, device)
        self._first = 0
        self.is_initialized = True

    @property
    def _held(self) -> dict[str, torch.Tensor]:
        """All tensors [batch, heads, slots, size], by the names of their attributes."""
        return {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def go_back(self, position: int) -> None:
        """Nothing has to be undone."""

    def free(self) -> None:
        self.keys = self.values = None

    def resize(self, capacity: int) -> None:
        slots = self._shape.tokens_kept(capacity)
        if self._owner.position - self._first > slots:
            self._let_go(self._owner.position)
        for name, held in self._held.items():
            setattr(self, name, self._resized(held, slots))

    def _resized(self, held: torch.Tensor, slots: int) -> torch.Tensor:
        batch_size, heads, old, size = held.shape
        if old == slots:  # as after a growth that failed half-way
            return held
        resized, end = allocate((batch_size, heads, slots, size), held.dtype, held.device), self._end
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
        assert self.keys is not None
        end = self._owner.position
        self._first = max(other._first, end - self.keys.shape[2])
        count, begin = end - self._first, self._first - other._first
        for name, held in self._held.items():
            held[:, :, :count] = other._held[name][:, :, begin : begin + count]

    def fill(self, chance: torch.Generator) -> None:
        """Hold random keys and values of as many tokens as the owner says."""
        assert self.keys is not None
        self._first = max(0, self._owner.position - self.keys.shape[2])
        for held in self._held.values():
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
        self._owner.places = None

    def make_room(self, tokens: int) -> None:
        """For so many new ones, which the owner has room for: what the window has left behind goes."""
        assert self.keys is not None
        if self._end + tokens > self.keys.shape[2]:
            self._let_go(self._owner.position)

    def place(self, row: int) -> tuple[int, int, int]:
        """Where keys and values of a sequence begin in memory, and which of its tokens they begin with."""
        assert self.keys is not None and self.values is not None
        return self.keys[row].data_ptr(), self.values[row].data_ptr(), self._first

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the memory was allocated at the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hold(key_states, value_states)

    def hold(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of new tokens [batch, heads, tokens, size], and return all that these see, as it is kept."""
        assert self.keys is not None and self.values is not None
        self.make_room(key_states.shape[-2])
        start = self._owner.position
        end = start + key_states.shape[-2]
        first = self._first_visible(start) - self._first
        start, end = start - self._first, end - self._first
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`hold` for one token of one sequence, [1, heads, size], in fewer operations."""
        assert self.keys is not None and self.values is not None
        self.make_room(1)
        position = self._owner.position
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
        end = self._end
        for held in self._held.values():
            held[:, :, :end] = held[:, :, :end].index_select(0, beam_idx.to(held.device))


class _Int8Slots(_Slots):
    """Keys and values in 8 bits. Attention of transformers' own gets them unpacked, a block at a time."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.hold(key_states, value_states)
        return unpacked(keys, self._shape.dtype), unpacked(values, self._shape.dtype)

    def hold(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().hold(packed(key_states), packed(value_states))

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().append(packed(key), packed(value))

    def fill(self, chance: torch.Generator) -> None:
        assert self.keys is not None
        self._first = max(0, self._owner.position - self.keys.shape[2])
        for held in self._held.values():
            rows, heads, _, nbytes = held.shape
            numbers = torch.randn(rows, heads, self._end, unpacked_size(nbytes), generator=chance)
            held[:, :, : self._end] = packed(numbers)


class _MarkedSlots(_Slots):
    """A block that chooses by marks which tokens it attends to: one of [size] for each, beside keys and values. It has no window."""

    def __init__(
        self, owner: SessionCache, shape: KvShape, batch_size: int, capacity: int, device: torch.device
    ) -> None:
        super().__init__(owner, shape, batch_size, capacity, device)
        self.marks: torch.Tensor | None = allocate((batch_size, 1, capacity, shape.mark_size), shape.dtype, device)

    @property
    def _held(self) -> dict[str, torch.Tensor]:
        return super()._held | ({} if self.marks is None else {"marks": self.marks})

    def mark(self, marks: torch.Tensor) -> torch.Tensor:
        """Keep those of new tokens [batch, tokens, size], and return those of all."""
        assert self.marks is not None
        end = self._owner.position + marks.shape[1]
        self.marks[:, 0, end - marks.shape[1] : end] = marks
        return self.marks[:, 0, :end]

    def free(self) -> None:
        super().free()
        self.marks = None


class _SlotsAndStates(States, _Slots):
    """A block that attends and has states beside it."""

    def __init__(
        self, owner: SessionCache, shape: KvShape, batch_size: int, capacity: int, device: torch.device
    ) -> None:
        States.__init__(self, owner, shape.states, batch_size, device)
        _Slots.__init__(self, owner, shape, batch_size, capacity, device)

    @property
    def nbytes(self) -> int:
        return States.nbytes.fget(self) + _Slots.nbytes.fget(self)  # pyright: ignore[reportOptionalCall]

    def resize(self, capacity: int) -> None:
        _Slots.resize(self, capacity)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: the memory was allocated at the start."""

    def leads_back_to(self, position: int) -> bool:
        return States.leads_back_to(self, position) and _Slots.leads_back_to(self, position)

    def take_from(self, other: Any) -> None:
        States.take_from(self, other)
        _Slots.take_from(self, other)

    def fill(self, chance: torch.Generator) -> None:
        States.fill(self, chance)
        _Slots.fill(self, chance)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        States.reorder_cache(self, beam_idx)
        _Slots.reorder_cache(self, beam_idx)

    def free(self) -> None:
        States.free(self)
        _Slots.free(self)


def _layer(
    owner: SessionCache, shape: KvShape, batch_size: int, capacity: int, device: torch.device
) -> _Slots | States:
    if not shape.attends:
        return States(owner, shape.states, batch_size, device)
    plain = _Int8Slots if shape.in_int8 else _Slots
    made = _SlotsAndStates if shape.states else _MarkedSlots if shape.mark_size else plain
    return made(owner, shape, batch_size, capacity, device)


class _Recorded(Exception):
    """Ends a forward pass as soon as a block has shown what it keeps."""


class ShapeRecorder(Cache):
    """Learns the shape of what a single block stores, from a pass through it of one token.

    `attends`: the block keeps keys and values and nothing else, so that the pass may end with them, or with the marks beside them
    if it `chooses` by such.
    """

    def __init__(
        self,
        window: int | None,
        dtype: torch.dtype,
        *,
        attends: bool,
        chooses: bool = False,
        chunked: bool = False,
        times: int = 1,
    ) -> None:
        super().__init__(layers=[])
        self.shape = KvShape(0, 0, 0, 0, window, dtype, chunked=chunked, times=times)
        self._attends, self._chooses = attends, chooses

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, key_heads, _, key_size = key_states.shape
        _, value_heads, _, value_size = value_states.shape
        kept = dict(key_heads=key_heads, key_size=key_size, value_heads=value_heads, value_size=value_size)
        self.shape = replace(self.shape, **kept, dtype=key_states.dtype)
        if self._attends and not self._chooses:
            raise _Recorded
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self.shape = replace(self.shape, mark_size=indexer_key_states.shape[-1])
        raise _Recorded

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        size = *conv_states.shape[1:-1], conv_kernel_size or conv_states.shape[-1]
        self._keeps("conv", state_idx, size, conv_states.dtype)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._keeps("recurrent", state_idx, tuple(recurrent_states.shape[1:]), recurrent_states.dtype)
        return recurrent_states

    def _keeps(self, kind: Kind, number: int, size: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = replace(self.shape, states=(*self.shape.states, StateShape(kind, number, size, dtype)))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    recorded = _Recorded
