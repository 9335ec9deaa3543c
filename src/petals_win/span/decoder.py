"""A decoder of transformers cut down to a run of its blocks: hidden states in, hidden states out.

The decoder's own forward() runs, so masks, positions and everything per layer are transformers'. Knows modules and hooks.
Does not know checkpoints, sessions or devices.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from petals_win.errors import UserError
from petals_win.host.threads import look_around
from petals_win.models.architecture import (
    ONLY_ATTENTION,
    WITH_STATES,
    attention_windows,
    attentions_of_a_block,
    chunked_blocks,
    config_of_blocks,
    find_blocks,
    kinds_of_blocks,
)
from petals_win.models.cuts import Cuts, sources_of_choices, sources_of_keys
from petals_win.models.rows import Row
from petals_win.span.cache import KvShape, SessionCache, ShapeRecorder
from petals_win.span.rotary import DeclaredRotary, declared, depends_on_length

logger = logging.getLogger(__name__)

_FEW_ROWS = 16  # are through before there is news of what else the PC does
Prompts = Sequence["torch.Tensor | None"]
Preparing = Callable[..., AbstractContextManager[None]]  # of modules, for one run


class CutDecoder:
    """The blocks [start, end) of a model. Blocks keep their absolute index: some compute with it."""

    def __init__(self, model: PreTrainedModel, start: int, end: int) -> None:
        blocks = find_blocks(model)
        self.start, self.end = start, end
        self._list_name = blocks.list_name
        self._config = blocks.decoder.config
        self._windows = attention_windows(self._config)
        self._kinds = kinds_of_blocks(self._config)
        self._has_states = bool(set(self._kinds) & set(WITH_STATES))
        self._chunked = chunked_blocks(self._config)
        self.row = Row.of(self._config)
        self.cuts = Cuts.of(self._config)
        self.sources_of_keys = sources_of_keys(self._config)
        self._sources_of_choices = sources_of_choices(self._config)
        self._layers = list(blocks.layers)[start:end]
        self._frame = _without_own_parameters(blocks.decoder, blocks.list_name)
        if self.row.own:
            object.__setattr__(self._frame, "project_per_layer_inputs", _as_given)  # the client has made them
        self._rotaries = [part for part in self._frame._modules.values() if isinstance(part, DeclaredRotary)]
        self._views: dict[tuple[int, int], nn.Module] = {}
        self._configs: dict[tuple[int, int], list[PreTrainedConfig]] = {}

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks themselves, in order."""
        return self._layers

    @property
    def config(self) -> PreTrainedConfig:
        """Of the decoder as a whole."""
        return self._config

    def part(self, name: str) -> nn.Module | None:
        """What the decoder has beside its blocks under that name, if it is still there: it has no parameters."""
        return self._frame._modules.get(name)

    def declared(self, tokens: int) -> AbstractContextManager[None]:
        """Meanwhile blocks compute as for a text of so many tokens in the end; else for what a call's positions reach."""
        return declared(self._rotaries, tokens)

    def table_for(self, tokens: int) -> int:
        """Texts with so many tokens in the end can share a pass, and be taken up, where this is equal; 0 for all short ones."""
        return max((rotary.table_for(tokens) for rotary in self._rotaries), default=0)

    def to(self, device: torch.device) -> None:
        """Move what is left of the decoder, such as tables of the rotary embedding, and the blocks."""
        for module in [self._frame, *self._layers]:
            module.to(device)
        self._views.clear()
        self._configs.clear()

    def configs(self, start: int, end: int) -> list[PreTrainedConfig]:
        """The configurations that the blocks [start, end), and the decoder around them, look at as they run."""
        if (start, end) not in self._configs:
            modules = [module for module in self._view(start, end).modules() if hasattr(module, "config")]
            configs = {
                id(config): config for module in modules if isinstance(config := module.config, PreTrainedConfig)
            }
            self._configs[start, end] = list(configs.values())
        return self._configs[start, end]

    def run(
        self,
        hidden: torch.Tensor,
        start: int,
        end: int,
        cache: Cache | None = None,
        prompts: Prompts | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows [batch, tokens, width], of most models hidden states, through the blocks [start, end), which lie within this run.

        `prompts` has an entry for each block: None or [batch or 1, p, hidden], added to the block's input at its first p
        tokens. `position_ids`, [1 or batch, tokens], default to what follows the cache's length.
        """
        layers = self._layers[start - self.start : end - self.start]
        output: list[torch.Tensor] = []

        states = self.row.hidden_of(hidden)

        # The decoder's own way to the first block (scales, norms, positions) has been gone at the client: only what comes
        # out of it is put aside.
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return _with_hidden(states, args, kwargs)

        def leave(_module: nn.Module, _args: Any, result: Any) -> None:
            output.append(result[0] if isinstance(result, tuple) else result)

        hooks = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
        for layer, prompt in zip(layers, prompts or (), strict=False):
            if prompt is not None:
                hooks.append(layer.register_forward_pre_hook(_adding(prompt), with_kwargs=True))
        hooks.append(layers[-1].register_forward_hook(leave))
        if hidden.shape[0] * hidden.shape[1] > _FEW_ROWS:
            hooks += [layer.register_forward_pre_hook(lambda *_: look_around()) for layer in layers]
        # Not the states themselves, which some models scale in place.
        in_its_place = hidden.new_zeros(*hidden.shape[:-1], self.row.hidden)
        try:
            if position_ids is None and isinstance(cache, SessionCache) and self._has_states:
                # Bamba counts the positions of its attention from what comes in, not from what the cache has.
                past, length = cache.position, hidden.shape[1]
                position_ids = torch.arange(past, past + length, device=hidden.device)[None]
            more = {} if position_ids is None else {"position_ids": position_ids}
            if (own := self.row.own_of(hidden, start, end)) is not None:
                more["per_layer_inputs"] = own
            self._view(start, end)(inputs_embeds=in_its_place, cache=cache, use_cache=cache is not None, **more)
        finally:
            for hook in hooks:
                hook.remove()
        return self.row.pack(output[0], self.row.all_own(hidden))

    def kv_shapes(self, dtype: torch.dtype) -> list[KvShape]:
        """What each block keeps per token of `dtype`, found by running it on the meta device.

        Works while the parameters are on the meta device only. Raises UserError if a block cannot be run alone, or keeps
        something else.
        """
        shapes = []
        for index in range(self.start, self.end):
            if index in self.sources_of_keys:  # it cannot be run alone, and keeps nothing
                shapes.append(KvShape(0, 0, 0, 0, None, dtype))
                continue
            try:
                shapes.append(self._kv_shape(index, dtype, "meta", _buffers_on_meta))
            except Exception:  # whatever a block raises that looks at values on its way, which there are none of
                logger.debug("Block %d cannot be run without values", index, exc_info=True)
                shapes.append(self._kv_shape_by_values(index, dtype))
        return shapes

    def _kv_shape_by_values(self, index: int, dtype: torch.dtype) -> KvShape:
        """With zeros for weights, which take no memory as long as they are only read."""
        try:
            return self._kv_shape(index, dtype, "cpu", _parameters_of_zeros)
        except Exception as e:  # whatever an unknown block raises when it is run in an unforeseen way
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            logger.debug("Block %d cannot be run alone", index, exc_info=True)
            raise UserError(
                f"Models of the type {self._config.model_type} are built in a way that petals-win cannot split: block {index} "
                f"does not run by itself ({reason}). Choose a model of another type, such as Llama, Mistral, Qwen or Gemma."
            ) from e

    def _kv_shape(self, index: int, dtype: torch.dtype, device: str, preparing: Preparing) -> KvShape:
        attends = self._kinds[index] in ONLY_ATTENTION
        chooses = self._kinds[index] == "indexed_attention" and index not in self._sources_of_choices
        recorder = ShapeRecorder(
            self._windows[index],
            dtype,
            attends=attends,
            chooses=chooses,
            chunked=self._chunked[index],
            times=attentions_of_a_block(self._config),
        )
        hidden = torch.zeros(1, 1, self.row.width, dtype=dtype, device=device)
        try:
            with suppress(ShapeRecorder.recorded), preparing(self._frame, self._layers[index - self.start]):
                self.run(hidden, index, index + 1, cache=recorder)
        finally:
            self._views.clear()  # they hold the buffers that the frame had in this run
        if attends and not recorder.shape.attends:
            raise ValueError("it keeps no keys and values")
        if chooses and not recorder.shape.mark_size:
            raise ValueError("it keeps nothing by which it chooses what it attends to")
        return recorder.shape

    def _view(self, start: int, end: int) -> nn.Module:
        if (start, end) not in self._views:
            view = copy.copy(self._frame)
            view._modules = dict(self._frame._modules)
            view._buffers = dict(
                self._frame._buffers
            )  # some models move theirs to where their inputs are, even to meta
            view._modules[self._list_name] = nn.ModuleList(self._layers[start - self.start : end - self.start])
            view.config = config_of_blocks(self._config, start, end)
            if self.row.streams > 1:
                view.config.altup_num_inputs = 1  # the others are made by the client, and put in at the first block
            self._views[start, end] = view
        return self._views[start, end]


class _Zero(nn.Module):
    """In the place of an embedding: what is added to the hidden states is already in them."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        # Without dimensions, so that it takes the dtype and the device of what it is added to.
        return torch.zeros(())


class _PassThrough(nn.Module):
    """In the place of a norm or projection before the first or after the last block."""

    def forward(self, hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        return hidden


def _as_given(_hidden: torch.Tensor, per_layer_inputs: torch.Tensor) -> torch.Tensor:
    return per_layer_inputs


def _without_own_parameters(decoder: PreTrainedModel, list_name: str) -> PreTrainedModel:
    """A shallow copy of the decoder without blocks, embeddings and norms; what has buffers only (rotary tables) stays."""
    frame = copy.copy(decoder)
    frame._modules = dict(decoder._modules)
    for name, child in decoder.named_children():
        if name == list_name:
            frame._modules[name] = nn.ModuleList()
        elif any(True for _ in child.parameters()):
            frame._modules[name] = _Zero() if isinstance(child, nn.Embedding) else _PassThrough()
        elif depends_on_length(child):
            frame._modules[name] = DeclaredRotary(child)
    return frame


@contextmanager
def _buffers_on_meta(*roots: nn.Module) -> Iterator[None]:
    """The computed tables of modules without their values: some models look them up at positions that are on the meta device."""
    held = [
        (module, name, buffer)
        for root in roots
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module, name, buffer in held:
            module._buffers[name] = buffer.to("meta")
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer
        for module in {module for root in roots for module in root.modules()}:
            # What a rotary embedding of several tables keeps beside its buffers, to be made anew.
            for name in [
                name for name, kept in vars(module).items() if isinstance(kept, torch.Tensor) and kept.is_meta
            ]:
                delattr(module, name)


@contextmanager
def _parameters_of_zeros(*roots: nn.Module) -> Iterator[None]:
    """Parameters that are on the meta device have values meanwhile."""
    held = [
        (module, name, parameter)
        for root in roots
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    try:
        for module, name, parameter in held:
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


def _with_hidden(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _adding(prompt: torch.Tensor) -> Any:
    def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        length = min(prompt.shape[1], hidden.shape[1])
        hidden = torch.cat([hidden[:, :length] + prompt[:, :length], hidden[:, length:]], dim=1)
        return _with_hidden(hidden, args, kwargs)

    return add
