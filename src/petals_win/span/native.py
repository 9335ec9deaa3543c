"""Plain blocks on a CPU, as lean.py describes them, by our kernels: one call for a step of few tokens, one for each block for many.

Knows what kernels read: weights, rotary tables, and where sessions keep keys and values. Does not know whether the result may be trusted:
span/joint.py tries that out.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from petals_win.host.threads import computing, look_around, most_threads
from petals_win.kernels.library import (
    BFLOAT16,
    FLOAT32,
    MOST_ROWS,
    STAGES,
    Block,
    Held,
    Kernels,
    Linear,
    Row,
    Step,
    kernels,
)
from petals_win.span.cache import SessionCache
from petals_win.span.decoder import CutDecoder
from petals_win.span.int4 import FewBitsLinear, Panels
from petals_win.span.layouts import seconds_of
from petals_win.span.lean import is_dense, is_plain
from petals_win.span.packed_linear import can_pack
from petals_win.span.rotary import DeclaredRotary

_ANGLES = 256  # positions by which the rotary tables grow
_LARGE = 2**16  # weights; a smaller layer takes next to nothing
_TRIED, _TRIED_ROWS, _TURNS = 768, 128, 5
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def suits(block: nn.Module, model_type: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels can compute the block, and are the fastest, if its weights stay as they are: row by row, or in four bits."""
    if dtype not in _KINDS or device.type != "cpu" or kernels() is None or not is_plain(block, model_type):
        return False
    if not is_dense(block):
        return False
    kinds = {type(module) for module in _linears(block)}
    if not all(module.weight.is_contiguous() for module in _linears(block) if isinstance(module, nn.Linear)):
        return False
    return kinds <= {nn.Linear, FewBitsLinear} and (FewBitsLinear in kinds or _reads_fastest(dtype))


def _reads_fastest(dtype: torch.dtype) -> bool:
    """Whether our kernels are as fast for plain weights as what else this processor has: not where it multiplies numbers of 16 bits itself."""
    return dtype is torch.float32 or (dtype is torch.bfloat16 and not can_pack(dtype))


class NativeBlocks:
    """The blocks of a decoder, all of which `suits`. Weights are the decoder's own."""

    def __init__(self, decoder: CutDecoder, library: Kernels, dtype: torch.dtype) -> None:
        self._start, self._library, self._dtype = decoder.start, library, dtype
        self._rotary: Any = decoder.part("rotary_emb")
        self._kept: list[torch.Tensor] = []  # that addresses lead to
        made = [self._block(layer) for layer in decoder.layers]
        self._blocks = (Block * len(made))(*made)
        self._width: int = decoder.config.hidden_size
        self._stages = (ctypes.c_int32 * (2 * STAGES * len(made)))()
        self._work = self._memory(MOST_ROWS)
        self._rows = (Row * MOST_ROWS)()
        self._layers = decoder.layers
        for layer in self._layers:
            _multiply_many_rows(layer, library)
        self._step = self._new_step()  # of few rows
        self.takes_many = _all_rows_pay(decoder.layers, dtype)
        self._tables = torch.empty(2, 0, 0)  # cosines and sines of the positions so far

    @classmethod
    def of(cls, decoder: CutDecoder, dtype: torch.dtype, device: torch.device) -> NativeBlocks | None:
        """None: the blocks are of another kind."""
        library, model_type = kernels(), decoder.config.model_type
        if library is None or decoder.part("rotary_emb") is None:
            return None
        if not all(suits(layer, model_type, dtype, device) for layer in decoder.layers):
            return None
        return cls(decoder, library, dtype)

    def let_go(self) -> None:
        """The blocks compute as before: nothing of them keeps a weight in memory that another one has taken the place of."""
        for layer in self._layers:
            for module in _linears(layer):
                vars(module).pop("forward", None)

    def run(self, parts: Sequence[tuple[SessionCache, torch.Tensor]], start: int, end: int) -> list[torch.Tensor]:
        """As JointPass.run, for at most MOST_ROWS rows in all, or any number if it `takes_many`."""
        hidden = torch.cat([part.reshape(-1, self._width) for _, part in parts]).to(torch.float32)
        many = len(hidden) > MOST_ROWS
        rows = (Row * len(hidden))() if many else self._rows
        step = self._new_step() if many else self._step
        kept = self._place(parts, rows, step)
        step.rows, step.hidden, step.row_count = ctypes.addressof(rows), hidden.data_ptr(), len(hidden)
        if many:
            self._run_many(step, start, end)
        else:
            step.work = self._work.data_ptr()
            self._run(step, start, end, torch.get_num_threads())
        del kept
        outputs = hidden.to(self._dtype).split([part.shape[0] * part.shape[1] for _, part in parts])
        return [output.view(part.shape) for output, (_, part) in zip(outputs, parts, strict=True)]

    def _run_many(self, step: Step, start: int, end: int) -> None:
        """Block by block, with as many threads as there are by then."""
        most = most_threads()
        work = self._memory(step.row_count, most)
        step.work = work.data_ptr()
        for index in range(start, end):
            look_around()
            one = Step.from_buffer_copy(step)  # no thread has come to it, nor comes late from the one before
            one.first = index - start
            self._run(one, index, index + 1, min(torch.get_num_threads(), most))

    def _new_step(self) -> Step:
        return Step(width=self._width, stages=ctypes.addressof(self._stages))

    def _run(self, step: Step, start: int, end: int, threads: int) -> None:
        step.blocks = ctypes.addressof(self._blocks) + (start - self._start) * ctypes.sizeof(Block)
        step.count, step.threads = end - start, threads
        ctypes.memset(self._stages, 0, ctypes.sizeof(self._stages))
        self._library.run(step)

    def _place(self, parts: Sequence[tuple[SessionCache, torch.Tensor]], rows: Any, step: Step) -> Any:
        """Let rows tell of each token where it belongs, and the step where angles are. Returns what the addresses lead to."""
        farthest = max(cache.position + part.shape[1] for cache, part in parts)
        by_row = isinstance(self._rotary, DeclaredRotary)
        if not by_row and farthest > self._tables.shape[1]:
            self._tables = self._angles(torch.arange(-(-farthest // _ANGLES) * _ANGLES))
        kept, count = [], 0
        for cache, part in parts:
            batch, tokens, _ = part.shape
            held = _held(cache, tokens)
            kept.append(held)
            for row in range(batch):
                place = ctypes.addressof(held[row])
                for position in range(cache.position, cache.position + tokens):
                    one = rows[count]
                    one.held, one.position, one.angle = place, position, count if by_row else position
                    count += 1
        tables = self._tables
        if by_row:
            tables = self._angles(torch.tensor([row.position for row in rows[:count]]))
        step.cosines, step.sines, step.turning = tables[0].data_ptr(), tables[1].data_ptr(), tables.shape[-1]
        return kept, tables

    def _memory(self, rows: int, threads: int = 1) -> torch.Tensor:
        """For the work of a step of so many rows."""
        return torch.empty(max(self._library.floats(block, rows, self._width, threads) for block in self._blocks))

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines, [2, positions, turning]."""
        cos, sin = self._rotary(torch.empty(1, 1), positions[None])
        return torch.stack([cos[0], sin[0]]).contiguous()

    def _block(self, layer: Any) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        block = Block(
            queries=self._linear(attention.q_proj),
            keys=self._linear(attention.k_proj),
            values=self._linear(attention.v_proj),
            out=self._linear(attention.o_proj),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
            norm=self._address(layer.input_layernorm.weight),
            eps=layer.input_layernorm.variance_epsilon,
            mlp_norm=self._address(layer.post_attention_layernorm.weight),
            mlp_eps=layer.post_attention_layernorm.variance_epsilon,
            scale=attention.scaling,
            size=attention.head_dim,
            query_heads=attention.q_proj.out_features // attention.head_dim,
            key_heads=attention.k_proj.out_features // attention.head_dim,
            turns=bool(getattr(attention, "use_rope", True)),
            kept=_KINDS[self._dtype],
        )
        if hasattr(attention, "q_norm"):
            block.query_norm, block.query_eps = (
                self._address(attention.q_norm.weight),
                attention.q_norm.variance_epsilon,
            )
            block.key_norm, block.key_eps = self._address(attention.k_norm.weight), attention.k_norm.variance_epsilon
        return block

    def _linear(self, module: nn.Linear) -> Linear:
        weight = module.few_bits.kept if isinstance(module, FewBitsLinear) else module.weight
        assert isinstance(weight, (torch.Tensor, Panels))
        kept = weight.panels if isinstance(weight, Panels) else weight
        assert kept.is_contiguous()
        self._kept.append(kept)
        bias = None if module.bias is None else self._address(module.bias)
        kind = weight.kind if isinstance(weight, Panels) else _KINDS[kept.dtype]
        return Linear(kept.data_ptr(), bias, module.out_features, module.in_features, kind)

    def _address(self, tensor: torch.Tensor) -> int:
        """Of its values in float32."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()


class _Product:
    """What a frozen linear layer computes, by our kernels. Keeps the layer's weight, not the layer."""

    def __init__(self, plain: nn.Linear, library: Kernels) -> None:
        self._library, self.weight, self.bias = library, plain.weight, plain.bias
        self._bias = None if plain.bias is None else plain.bias.detach().float()
        bias = None if self._bias is None else self._bias.data_ptr()
        kind = _KINDS[plain.weight.dtype]
        self._layer = Linear(plain.weight.data_ptr(), bias, plain.out_features, plain.in_features, kind)

    def takes(self, inputs: torch.Tensor) -> bool:
        """Whether these are of the weight's dtype, and nobody wants their gradient."""
        learns = torch.is_grad_enabled() and inputs.requires_grad
        return inputs.numel() > 0 and inputs.dtype is self.weight.dtype and not learns

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        return self._library.linear(self._layer, rows.float()).to(inputs.dtype).view(*inputs.shape[:-1], -1)


class NativeLinear(nn.Module):
    """A frozen linear layer, by our kernels where they are faster."""

    def __init__(self, plain: nn.Linear, library: Kernels) -> None:
        super().__init__()
        self.plain, self._product = plain, _Product(plain, library)
        self._many = many_rows_pay(plain.weight.dtype)

    @classmethod
    def of(cls, layer: nn.Module) -> NativeLinear | None:
        """None for a layer that kernels cannot compute. The weight stays the layer's own."""
        library = kernels()
        if library is None or type(layer) is not nn.Linear or layer.weight.requires_grad:
            return None
        weight = layer.weight
        if weight.device.type != "cpu" or not _reads_fastest(weight.dtype) or not weight.is_contiguous():
            return None
        return cls(layer, library)

    @property
    def weight(self) -> torch.Tensor:
        """[outputs, inputs], as it was."""
        return self.plain.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        few = inputs.numel() <= MOST_ROWS * inputs.shape[-1]
        return self._product(inputs) if (few or self._many) and self._product.takes(inputs) else self.plain(inputs)


def _multiply_many_rows(block: nn.Module, library: Kernels) -> None:
    """Let the plain linear layers of a block multiply many rows, as prompts are, by our kernels where these are faster.

    torch leaves that to MKL, which uses half of what AMD's processors with AVX-512 can do. Few rows, and small layers, go as ever.
    """
    for module in _linears(block):
        if type(module) is nn.Linear and module.weight.numel() >= _LARGE and many_rows_pay(module.weight.dtype):
            module.forward = functools.partial(_many_rows, _Product(module, library))


def _many_rows(product: _Product, input: torch.Tensor) -> torch.Tensor:
    """Instead of the forward() of nn.Linear, whose argument has that name."""
    if input.numel() > MOST_ROWS * input.shape[-1] and product.takes(input):
        return product(input)
    return linear(input, product.weight, product.bias)


@functools.cache
@torch.inference_mode()
def many_rows_pay(dtype: torch.dtype) -> bool:
    """Whether our kernels multiply many rows faster than torch, by the shortest of some calls in turn."""
    library = kernels()
    if library is None or dtype not in _KINDS:
        return False
    plain = nn.Linear(_TRIED, _TRIED, bias=False, dtype=dtype).requires_grad_(False)
    product, inputs = _Product(plain, library), torch.ones(_TRIED_ROWS, _TRIED, dtype=dtype)
    with computing():
        turns = [(seconds_of(product, inputs), seconds_of(plain, inputs)) for _ in range(_TURNS)]
    return min(ours for ours, _ in turns) < min(theirs for _, theirs in turns)


def _all_rows_pay(blocks: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether blocks compute many rows, as prompts are, faster by our kernels from end to end. Small ones go the usual way, as their layers do."""
    large = any(layer.in_features * layer.out_features >= _LARGE for block in blocks for layer in _linears(block))
    return large and _reads_fastest(dtype) and many_rows_pay(dtype)


def _linears(block: Any) -> list[nn.Linear]:
    attention, mlp = block.self_attn, block.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _held(cache: SessionCache, tokens: int) -> Sequence[Any]:
    """For each sequence of a session, where its blocks keep keys and values, with room for so many tokens more."""
    layers: Any = cache.layers
    for slots in layers:
        if slots.window is not None:
            slots.make_room(tokens)
    if cache.places is None:
        cache.places = [
            (Held * len(layers))(*(_place(slots, row) for slots in layers)) for row in range(layers[0].keys.shape[0])
        ]
    return cache.places


def _place(slots: Any, row: int) -> Held:
    keys, values, first = slots.place(row)
    return Held(keys, values, slots.keys.shape[2], first, slots.window or 0, slots.chunked)
