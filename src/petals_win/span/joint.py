"""One pass of many sessions through a run of blocks: all their tokens in one row, attention for each session on its own.

Everything but attention computes each token by itself, so that weights are read once for all sessions. Knows transformers'
interface of attention functions. Does not know when sessions share a pass.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from petals_win.span.cache import KvShape, SessionCache
from petals_win.span.decoder import CutDecoder
from petals_win.span.probe import agrees

logger = logging.getLogger(__name__)

_NAME = "petals_win_joint"

# The pass that this thread computes: an attention function is not told.
_of_this_thread = threading.local()


class JointPass:
    """Passes of several sessions through the blocks of one decoder."""

    def __init__(self, decoder: CutDecoder, device: torch.device, dtype: torch.dtype) -> None:
        self._decoder = decoder
        self._device, self._dtype = device, dtype
        self.works = False

    def try_out(self, shapes: Sequence[KvShape], exact: bool) -> None:
        """Find out whether sessions of this decoder, which keeps `shapes`, can share a pass; if not, `works` stays False."""
        try:
            with torch.inference_mode():
                self.works = agrees(self._decoder, shapes, self.run, self._device, exact)
        except Exception as e:  # whatever a model raises whose attention does not go through the interface
            logger.debug("A joint pass fails", exc_info=True)
            logger.info("Sessions are computed one by one: %s", e)
            return
        if not self.works:
            logger.info("Sessions are computed one by one: this model computes something else for several together")

    def run(self, parts: Sequence[tuple[SessionCache, torch.Tensor]], start: int, end: int) -> list[torch.Tensor]:
        """Hidden states [batch, tokens, hidden] of each session, after its cache's position, through the blocks [start, end).

        Returns the same shapes, on the CPU. The caller advances the positions.
        """
        hidden = torch.cat([hidden.reshape(1, -1, hidden.shape[-1]) for _, hidden in parts], dim=1)
        joint = JointCache(parts, start, self._device)
        with _attention_by(joint, self._decoder.configs(start, end)):
            output = self._decoder.run(
                hidden.to(self._device, self._dtype), start, end, joint, position_ids=joint.position_ids
            )
        rows = output.cpu().split([hidden.shape[0] * hidden.shape[1] for _, hidden in parts], dim=1)
        return [row.view(hidden.shape) for row, (_, hidden) in zip(rows, parts, strict=True)]


class JointCache(Cache):
    """The caches of several sessions as one, while all their new tokens stand in one row."""

    def __init__(self, parts: Sequence[tuple[SessionCache, torch.Tensor]], first: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._first = first
        self._device = device
        self._caches = [cache for cache, _ in parts]
        self.shapes = [(hidden.shape[0], hidden.shape[1]) for _, hidden in parts]
        self.length = sum(rows * tokens for rows, tokens in self.shapes)
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []  # by the block that computes, of each session
        self._window: int | None = None
        self._masks: dict[tuple[int, int | None, torch.dtype], torch.Tensor | None] = {}
        self.position_ids = torch.tensor(
            [
                [
                    position
                    for cache, (rows, tokens) in zip(self._caches, self.shapes, strict=True)
                    for _ in range(rows)
                    for position in range(cache.position, cache.position + tokens)
                ]
            ],
            device=device,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots: list[Any] = [cache.layers[layer_idx - self._first] for cache in self._caches]
        self._window = slots[0].window
        keys, values = self.of_each(key_states), self.of_each(value_states)
        self.held = [slot.update(key, value) for slot, key, value in zip(slots, keys, values, strict=True)]
        return key_states, value_states

    def of_each(self, states: torch.Tensor) -> list[torch.Tensor]:
        """[1, heads, length, size] as [batch, heads, tokens, size] for each session."""
        parts = states[0].split([rows * tokens for rows, tokens in self.shapes], dim=1)
        return [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, self.shapes, strict=True)]

    def mask(self, index: int, dtype: torch.dtype, additive: bool) -> torch.Tensor | None:
        """What the new tokens of session `index` see of what the present block holds, [1, 1, tokens, held]; None: all of it."""
        tokens, position = self.shapes[index][1], self._caches[index].position
        if tokens == 1:
            return None
        key = (index, self._window, dtype)
        if key not in self._masks:
            held = self.held[index][0].shape[-2]
            asking = torch.arange(position, position + tokens, device=self._device)[:, None]
            asked = torch.arange(position + tokens - held, position + tokens, device=self._device)[None, :]
            visible = asked <= asking
            if self._window is not None:
                visible &= asked > asking - self._window
            if additive:
                hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self._device)
                visible = torch.where(visible, torch.zeros_like(hidden), hidden)
            self._masks[key] = visible[None, None]
        return self._masks[key]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length, 0


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
    usual = _usual_attention(module, _of_this_thread.usual)
    outputs = []
    for index, (part, (keys, values)) in enumerate(zip(joint.of_each(query), joint.held, strict=True)):
        mask = joint.mask(index, query.dtype, additive=_of_this_thread.usual == "eager")
        output, _ = usual(module, part, keys, values, mask, **settings)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _usual_attention(module: nn.Module, implementation: str) -> Any:
    """The function that the module's own code would call."""
    code: Any = sys.modules[type(module).__module__]
    functions = getattr(code, "ALL_ATTENTION_FUNCTIONS", None) or AttentionInterface()
    eager: Any = getattr(code, "eager_attention_forward", None)
    return functions.get_interface(implementation, eager)


AttentionInterface.register(_NAME, _attend)
