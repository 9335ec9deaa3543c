"""One pass of many sessions through a run of blocks: all their tokens in one row, attention for each session on its own.

Everything but attention computes each token by itself, so that weights are read once for all sessions. Knows transformers'
interface of attention functions. Does not know when sessions share a pass.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from petals_win.kernels.library import MOST_ROWS
from petals_win.span import kv_int8
from petals_win.span.cache import KvShape, SessionCache
from petals_win.span.decoder import CutDecoder
from petals_win.span.lean import LeanBlocks
from petals_win.span.native import NativeBlocks
from petals_win.span.probe import agrees

logger = logging.getLogger(__name__)

_NAME = "petals_win_joint"
_MOST_CALLS = 4  # of the kernels for one pass: 64 rows take them 100 ms where the other way takes 135

_Part = tuple[SessionCache, torch.Tensor]

# The pass that this thread computes: an attention function is not told.
_of_this_thread = threading.local()


class JointPass:
    """Passes of several sessions through the blocks of one decoder."""

    def __init__(self, decoder: CutDecoder, device: torch.device, dtype: torch.dtype) -> None:
        self._decoder = decoder
        self._device, self._dtype = device, dtype
        self._lean: LeanBlocks | None = None
        self._native: NativeBlocks | None = None  # for as many rows as it takes; beside it, _lean is there for more
        self.works = False
        self._in_int8 = False

    def try_out(self, shapes: Sequence[KvShape], exact: bool) -> None:
        """Find out whether sessions of this decoder, which keeps `shapes`, can share a pass; if not, `works` stays False."""
        if getattr(self._decoder.config, "attn_temperature_tuning", None):
            # By the length that a cache tells, which a joint one cannot; the few rows of a trial would not show it.
            logger.info("Sessions are computed one by one: this model scales queries by how long a session is")
            return
        self._in_int8 = any(shape.in_int8 for shape in shapes)
        native = NativeBlocks.of(self._decoder, self._dtype, self._device)
        if native is not None:
            self._lean = LeanBlocks.of(self._decoder, join=False)
            self._native = None if self._in_int8 else native  # it reads keys and values as they are
            if self._agrees(shapes, exact, "The kernels are not used"):
                self.works = True
                return
            native.let_go()
            self._native = None
        self._lean = LeanBlocks.of(self._decoder)
        if self._lean is not None and self._agrees(shapes, exact, "The short way through these blocks is not taken"):
            self.works = True
            return
        self._lean = None
        self.works = self._agrees(shapes, exact, "Sessions are computed one by one")

    @property
    def is_lean(self) -> bool:
        """Whether a session that is alone has an advantage of it, too, in steps of few tokens."""
        return self._lean is not None

    @property
    def takes_prompts(self) -> bool:
        """Whether it has in long steps."""
        return self._native is not None and self._native.takes_many

    @property
    def in_pieces(self) -> bool:
        """Whether only here what a session keeps is not unpacked as a whole, block by block."""
        return self._in_int8 and self.works

    def room_beside(self, rows: int) -> int | None:
        """How many rows more a pass of so many takes without another way than the kernels'; None: it does not go their way."""
        return None if self._native is None or rows >= MOST_ROWS else MOST_ROWS - rows

    def _agrees(self, shapes: Sequence[KvShape], exact: bool, otherwise: str) -> bool:
        try:
            with torch.inference_mode():
                works = agrees(self._decoder, shapes, self.run, self._device, exact, long=self.takes_prompts)
        except Exception as e:  # whatever a model raises whose attention does not go through the interface
            # As text: a record that keeps the error keeps its frames, too, and with them the checkpoint's open files.
            logger.debug("A joint pass fails:\n%s", traceback.format_exc())
            logger.info("%s: %s", otherwise, str(e) or type(e).__name__)
            return False
        if not works:
            logger.info("%s: this model computes something else for several together", otherwise)
        return works

    def run(self, parts: Sequence[_Part], start: int, end: int) -> list[torch.Tensor]:
        """Hidden states [batch, tokens, hidden] of each session, after its cache's position, through the blocks [start, end).

        Returns the same shapes, on the CPU. The caller advances the positions.
        """
        if self._native is not None:
            if groups := _of_few_rows(parts):
                return [output for group in groups for output in self._native.run(group, start, end)]
            if self._native.takes_many:
                return self._native.run(parts, start, end)
        # Single tokens come first: attention has a short way for them.
        order = sorted(range(len(parts)), key=lambda index: _rows_of(parts[index][1]) > 1)
        ordered = [parts[index] for index in order]
        hidden = torch.cat([hidden.reshape(1, -1, hidden.shape[-1]) for _, hidden in ordered], dim=1)
        joint = JointCache(
            [cache for cache, _ in ordered],
            [hidden.shape[:2] for _, hidden in ordered],
            self._device,
            self._decoder.sources_of_keys,
        )
        hidden = hidden.to(self._device, self._dtype)
        if self._lean is not None:
            output = self._lean.run(hidden[0], start, end, joint.position_ids, joint.attend)[None]
        else:
            with _attention_by(joint, self._decoder.configs(start, end)):
                output = self._decoder.run(hidden, start, end, joint, position_ids=joint.position_ids)
        rows = output.cpu().split([_rows_of(hidden) for _, hidden in ordered], dim=1)
        outputs = {index: row.view(parts[index][1].shape) for index, row in zip(order, rows, strict=True)}
        return [outputs[index] for index in range(len(parts))]


def _of_few_rows(parts: Sequence[_Part]) -> list[list[_Part]]:
    """The parts in groups that the kernels take; none where more of them, or one that is too long, are faster another way."""
    groups, rows = list[list[_Part]](), MOST_ROWS
    for part in parts:
        more = _rows_of(part[1])
        if more > MOST_ROWS:
            return []
        rows += more
        if rows > MOST_ROWS:
            groups.append([])
            rows = more
        groups[-1].append(part)
    return groups if len(groups) <= _MOST_CALLS else []


def _rows_of(hidden: torch.Tensor) -> int:
    """How many rows of a joint pass [batch, tokens, hidden] make up."""
    return hidden.shape[0] * hidden.shape[1]


class JointCache(Cache):
    """The caches of several sessions as one, while all their new tokens stand in one row: single ones first."""

    def __init__(
        self,
        caches: Sequence[SessionCache],
        shapes: Sequence[Sequence[int]],
        device: torch.device,
        sources: Mapping[int, int],
    ) -> None:
        """`shapes` are batch and new tokens of each session; `sources` tells of blocks without keys and values whose they take."""
        super().__init__(layers=[])
        self._sources, self._to_others = sources, frozenset(sources.values())
        self._held_by: dict[int, tuple[list[tuple[torch.Tensor, torch.Tensor]], int | None, bool]] = {}
        self._device = device
        self._caches = caches
        rows = [batch * tokens for batch, tokens in shapes]
        self.singles = sum(count == 1 for count in rows)
        self._rows, self._shapes = rows[self.singles :], shapes[self.singles :]
        self._length = sum(rows)
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []  # by the block that computes, of each session
        self._window: int | None = None
        self._chunked = False
        self._masks: dict[tuple[int, int | None, bool], torch.Tensor] = {}
        positions = [
            position
            for cache, (batch, tokens) in zip(caches, shapes, strict=True)
            for position in [*range(cache.position, cache.position + tokens)] * batch
        ]
        self.position_ids = torch.tensor([positions], device=device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.take(layer_idx, _rows_first(key_states), _rows_first(value_states))
        return key_states, value_states

    def take(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep keys and values [rows, heads, size] of the block `index`, each session its own."""
        slots = [cache.layer(index) for cache in self._caches]
        self._window, self._chunked = slots[0].window, slots[0].chunked
        self.held = [slot.append(*one) for slot, *one in zip(slots, key[: self.singles], value, strict=False)]
        if self._rows:
            others = zip(slots[self.singles :], self.of_the_others(key), self.of_the_others(value), strict=True)
            self.held += [slot.hold(keys, values) for slot, keys, values in others]
        if index in self._to_others:
            self._held_by[index] = self.held, self._window, self._chunked

    def turn_to(self, index: int) -> None:
        """The block `index` attends now: to what another one holds, if it takes that one's keys and values."""
        if index in self._sources:
            self.held, self._window, self._chunked = self._held_by[self._sources[index]]

    def of_the_others(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of [rows, heads, size] the part [batch, heads, tokens, size] of each session with more than one row."""
        parts = states[self.singles :].split(self._rows)
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self._shapes, strict=True)]

    def attend(
        self, module: nn.Module, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """For blocks of the plain kind (lean.py): [rows, heads, size] of new rows to [rows, heads x size]."""
        self.take(index, key, value)
        scale: Any = module.scaling
        outputs = [output.flatten(1) for output in self.plainly_of_singles(query, scale)]
        for number, part in enumerate(self.of_the_others(query) if self._rows else ()):
            kept, mask = self.held[self.singles + number], self.mask(number, None)
            output = _attention(sdpa_attention_forward, True, module, part, kept, mask, scaling=scale)
            outputs.append(output.flatten(2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def plainly_of_singles(self, query: torch.Tensor, scale: float | None) -> list[torch.Tensor]:
        """Scaled dot product attention of the single tokens among [rows, heads, size]: [1, heads, size] for each."""
        if not self.singles:
            return []
        heads = self.held[0][0].shape[1]
        # The queries of the heads that share a key stand in for tokens: keys need not be repeated for them.
        parts = query[: self.singles].unflatten(1, (heads, -1)).split(1)
        held = zip(parts, self.held, strict=False)
        if self.held[0][0].dtype is torch.int8:
            return [kv_int8.attend(part, *kept, None, scale).flatten(1, 2) for part, kept in held]
        return [scaled_dot_product_attention(part, *kept, scale=scale).flatten(1, 2) for part, kept in held]

    def mask(self, index: int, additive: torch.dtype | None) -> torch.Tensor | None:
        """What new tokens of the session see of what the present block holds for it, [1, 1, tokens, held]; None: all of it.

        `index` counts sessions with more than one row. The mask is True where something is seen, or is added in a dtype.
        """
        tokens, position = self._shapes[index][1], self._caches[self.singles + index].position
        if tokens == 1:
            return None
        kind = index, self._window, self._chunked
        if kind not in self._masks:
            held = self.held[self.singles + index][0].shape[-2]
            asking = torch.arange(position, position + tokens, device=self._device)[:, None]
            asked = torch.arange(position + tokens - held, position + tokens, device=self._device)[None, :]
            visible = asked <= asking
            if self._window is not None and self._chunked:
                visible &= asked // self._window == asking // self._window
            elif self._window is not None:
                visible &= asked > asking - self._window
            if additive is not None:
                zero = torch.zeros((), dtype=additive, device=self._device)
                visible = torch.where(visible, zero, torch.finfo(additive).min)
            self._masks[kind] = visible[None, None]
        return self._masks[kind]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length, 0


@contextmanager
def _attention_by(joint: JointCache, configs: Sequence[Any]) -> Iterator[None]:
    """Let models of these configurations compute attention with the sessions' own keys and values."""
    before = [config._attn_implementation for config in configs]
    _of_this_thread.joint, _of_this_thread.usual = joint, before[0]
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        _of_this_thread.joint = None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """[1, heads, length, size] to [1, length, heads, size]: what the model's usual function computes for each session alone."""
    joint: JointCache = _of_this_thread.joint
    joint.turn_to(getattr(module, "layer_idx", -1))
    usual = _usual_attention(module, _of_this_thread.usual)
    plain = usual is sdpa_attention_forward and settings.get("position_bias") is None
    if plain:
        outputs = joint.plainly_of_singles(_rows_first(query), settings.get("scaling"))
    else:
        # Of nothing, split() makes one part.
        singles = query[:, :, : joint.singles].split(1, dim=2) if joint.singles else ()
        held = zip(singles, joint.held, strict=False)
        outputs = [_attention(usual, False, module, part, kept, None, **settings).flatten(0, 1) for part, kept in held]
    others = zip(joint.of_the_others(_rows_first(query)), joint.held[joint.singles :], strict=True)
    additive = query.dtype if _of_this_thread.usual == "eager" else None
    for index, (part, kept) in enumerate(others):
        output = _attention(usual, plain, module, part, kept, joint.mask(index, additive), **settings)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _attention(
    usual: Any,
    plain: bool,
    module: nn.Module,
    query: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    **settings: Any,
) -> torch.Tensor:
    """[batch, heads, tokens, size] to [batch, tokens, heads, size], by the usual function. `plain`: it is scaled dot product attention."""
    if kept[0].dtype is not torch.int8:
        return usual(module, query, *kept, mask, **settings)[0]
    if plain:
        return kv_int8.attend(query, *kept, mask, settings.get("scaling")).transpose(1, 2)
    return usual(module, query, *(kv_int8.unpacked(each, query.dtype) for each in kept), mask, **settings)[0]


def _rows_first(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, rows, size] to [rows, heads, size]."""
    return states[0].transpose(0, 1)


def _usual_attention(module: nn.Module, implementation: str) -> Any:
    """The function that the module's own code would call."""
    code: Any = sys.modules[type(module).__module__]
    functions = getattr(code, "ALL_ATTENTION_FUNCTIONS", None) or AttentionInterface()
    eager: Any = getattr(code, "eager_attention_forward", None)
    return functions.get_interface(implementation, eager)


AttentionInterface.register(_NAME, _attend)
