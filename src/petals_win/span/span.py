"""A loaded span [start, end) of the blocks of a model: steps with a cache, and forward and backward passes without.

All methods of one span run in one thread, the caller's compute thread. Knows torch. Knows nothing of networks, and leaves the
number of threads to the caller.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from petals_win.models.architecture import empty_model, find_blocks
from petals_win.models.cuts import Cuts
from petals_win.models.rows import Row
from petals_win.models.source import ModelSource
from petals_win.span.cache import BEYOND_WINDOW, ROOM_BEYOND, KvShape, SessionCache, in_int8
from petals_win.span.decoder import CutDecoder, Prompts
from petals_win.span.filling import Filling
from petals_win.span.joint import JointPass
from petals_win.span.kv_int8 import KvCacheDtype
from petals_win.span.probe import continues, parts_of_each_kind
from petals_win.span.quantized_linear import Quant
from petals_win.span.session import Session, Step
from petals_win.span.state import CannotTruncate, State

if TYPE_CHECKING:
    from petals_win.span.adapters import Adapters

logger = logging.getLogger(__name__)

# A long prompt goes through the blocks in pieces of at most so many tokens (of all rows together), which bounds the memory for
# activations and attention.
CHUNK_TOKENS = 1024
# A step of no more tokens, of all rows together, takes as long as its operations and the reading of weights, not the computing.
FEW_TOKENS = 16


class Span:
    """The blocks [start, end) of a model on one device. Indices of blocks are always the whole model's."""

    def __init__(
        self,
        config: PreTrainedConfig,
        decoder: CutDecoder,
        shapes: Sequence[KvShape],
        device: torch.device,
        quant: Quant,
        weight_bytes: int,
    ):
        self._decoder = decoder
        self._shapes = list(shapes)
        self._joint = JointPass(decoder, device, shapes[0].dtype)
        self._adapters: Adapters | None = None
        self._continues = True
        self.config = config
        self.start, self.end = decoder.start, decoder.end
        self.device = device
        self.dtype = shapes[0].dtype
        self.quant: Quant = quant
        self.weight_bytes = weight_bytes

    @classmethod
    def load(
        cls,
        source: ModelSource,
        start: int,
        end: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quant: Quant = "none",
        kv_cache: KvCacheDtype = "auto",
        adapters: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Span:
        """Load the blocks [start, end) of `source`, and only them.

        `dtype` defaults to the checkpoint's. With `quant` the weights of linear layers are kept in fewer bits, one by one, so that
        one of them in `dtype` is the most that is in memory; int4 takes over what a file has in four bits. With `kv_cache`
        int8 sessions keep keys and values in 8 bits.
        `adapters` are folders or hub ids of LoRA adapters. `progress` gets the number of blocks loaded so far and of all. Raises ValueError for a range outside of
        the model, UserError for a checkpoint that is damaged or cannot be served.
        """
        if not 0 <= start < end <= source.num_blocks:
            raise ValueError(f"{source.name} has the blocks 0:{source.num_blocks}; {start}:{end} is no part of them")
        began = time.perf_counter()
        device, dtype = torch.device(device), dtype or source.dtype
        model = empty_model(source.config, dtype)
        blocks = find_blocks(model)
        empty = CutDecoder(model, start, end)
        empty.cuts.check(start, end)
        shapes = empty.kv_shapes(dtype)
        if kv_cache == "int8":
            shapes = in_int8(shapes, blocks.decoder.config.model_type)

        how: dict[str, Any] = {"dtype": dtype, "device": device, "quant": quant, "progress": progress}
        filling = Filling(source, model, start, end, stay_plain=bool(adapters), **how)  # peft knows plain layers only
        filling.load()
        decoder = CutDecoder(model, start, end)
        decoder.to(device)
        span = cls(source.config, decoder, shapes, device, quant, filling.weight_bytes)
        if adapters:
            from petals_win.span.adapters import Adapters  # here, since peft takes seconds to import

            span._adapters = Adapters(decoder.layers, start, blocks.prefix, source.num_blocks)
            for name in adapters:
                span._adapters.load(name, source.token, dtype, device)
        span.try_out()
        seconds = time.perf_counter() - began
        logger.info(
            "Loaded the blocks %d:%d of %s: %.0f MiB in %.1f s",
            start,
            end,
            source.name,
            span.weight_bytes / 2**20,
            seconds,
        )
        return span

    def try_out(self) -> None:
        """Find out what these blocks can do, and the fastest way through them. Without it, steps are computed one by one."""
        with torch.inference_mode():
            self._continues = continues(self._decoder, self._shapes, self.device)
        exact = self.dtype is torch.float32 and self.quant == "none" and self.kv_cache == "auto"
        self._joint.try_out(self._shapes, exact=exact)

    @property
    def num_blocks(self) -> int:
        return self.end - self.start

    @property
    def kv_cache(self) -> KvCacheDtype:
        """How sessions keep keys and values."""
        return "int8" if any(shape.in_int8 for shape in self._shapes) else "auto"

    @property
    def row(self) -> Row:
        """What passes from block to block for each token."""
        return self._decoder.row

    @property
    def kinds(self) -> list[range]:
        """Of each kind of block one, or as many as can only be computed together."""
        parts = parts_of_each_kind(self._decoder, self._shapes)
        return [range(self.start + part.start, self.start + part.stop) for part in parts]

    @property
    def cuts(self) -> Cuts:
        """Where the model may be cut."""
        return self._decoder.cuts

    @property
    def cache_bytes_per_token(self) -> int:
        """Of one sequence in all blocks of the span, with a share of its recurrent states."""
        return sum(shape.planned_bytes_per_token for shape in self._shapes)

    @property
    def block_cache_bytes_per_token(self) -> int:
        """Of one sequence in the block that keeps most."""
        return max(1, max(shape.planned_bytes_per_token for shape in self._shapes))

    def session_bytes(self, batch_size: int, tokens: int, start: int | None = None, end: int | None = None) -> int:
        """What a session over the blocks [start, end) takes for so many tokens; default: all blocks of the span."""
        shapes = self._shapes_of(*self._range(start, end))
        return batch_size * sum(shape.bytes_of(tokens) for shape in shapes)

    def longest_session(
        self, nbytes: int, most: int, batch_size: int = 1, start: int | None = None, end: int | None = None
    ) -> int:
        """For how many tokens, of at most `most`, a session over the blocks [start, end) finds room in so many bytes."""
        tokens = range(most + 1)
        return bisect_right(tokens, nbytes, key=lambda count: self.session_bytes(batch_size, count, start, end)) - 1

    def takes_back(self, tokens: int, start: int | None = None, end: int | None = None) -> int:
        """How many of its last tokens a session of at most `tokens` can surely forget at once."""
        shapes = self._shapes_of(*self._range(start, end))
        if any(shape.states for shape in shapes):
            return 0
        return tokens if all(shape.tokens_kept(tokens) == tokens for shape in shapes) else BEYOND_WINDOW

    @property
    def piece_tokens(self) -> int:
        """How many tokens of each row may go through the blocks at once."""
        return CHUNK_TOKENS if all(shape.window is None for shape in self._shapes) else ROOM_BEYOND

    def open(
        self,
        batch_size: int,
        max_length: int,
        start: int | None = None,
        end: int | None = None,
        adapter: str = "",
        *,
        room: int | None = None,
        declared: int | None = None,
        past: tuple[State, int] | None = None,
    ) -> Session:
        """Allocate the cache of a session over the blocks [start, end); default: all blocks of the span.

        `room` tokens are allocated at first; default: max_length. `declared` is how long the text may become that is asked for at all
        nodes, by default max_length: rotary tables that depend on a text's length are made for it. `past`: the session begins as another one of the same blocks
        and rows was after so many tokens, of whose state it takes a copy; or anew, if that leads no way back to there. Raises
        ValueError for a range outside of the span or sizes below one, KeyError for an unknown adapter, RuntimeError (torch's) if
        memory does not suffice.
        """
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"A session needs at least one sequence of one token, not {batch_size} of {max_length}")
        start, end = self._range(start, end)
        self._switch_to(adapter)
        room = max_length if room is None else min(room, max_length)
        cache: State | None = None
        declared = max_length if declared is None else declared
        if past is not None and self.may_be_taken_up(declared):
            state, tokens = past
            with suppress(CannotTruncate):
                cache = state.fork(tokens, room)
        if cache is None:
            cache = SessionCache(self._shapes_of(start, end), start, batch_size, room, self.device)
        return Session(batch_size, max_length, room, declared, start, end, adapter, cache)

    def step(
        self,
        session: Session,
        hidden: torch.Tensor,
        *,
        prompts: Prompts | None = None,
        hypo_ids: torch.Tensor | None = None,
        start: int | None = None,
    ) -> torch.Tensor:
        """Continue a session by hidden states [batch, tokens, hidden] of at least one token; returns the same shape on the CPU.

        `hypo_ids` (int64, [batch]): row i goes on from what row hypo_ids[i] has seen. `prompts` has an entry for each block of
        the session, None or [batch or 1, p, hidden], added to the block's input at the first p tokens of this call. `start`:
        the session forgets all but its first `start` tokens before. Raises ValueError for shapes that do not fit the session,
        or more tokens than it can hold. A step that raises leaves the session as it was, or cut to `start`, and may be made
        again; if there is no way back, as after rows were reordered, it closes the session.
        """
        step = self.begin(session, hidden, prompts=prompts, hypo_ids=hypo_ids, start=start)
        tokens = min(max(1, CHUNK_TOKENS // session.batch_size), self.piece_tokens)
        try:
            while step.left:
                self.advance([(step, tokens)])
            return step.output()
        except BaseException:
            step.undo()
            raise

    def begin(
        self,
        session: Session,
        hidden: torch.Tensor,
        *,
        prompts: Prompts | None = None,
        hypo_ids: torch.Tensor | None = None,
        start: int | None = None,
    ) -> Step:
        """Check what `step` is given, make room for it, reorder the rows; `advance` then computes it in pieces.

        Raises as `step` does. Whoever cannot carry the step to its end calls its `undo`.
        """
        cache = session.open_cache
        self._check_hidden(hidden)
        batch_size, length, _ = hidden.shape
        if batch_size != session.batch_size:
            raise ValueError(f"The session has {session.batch_size} rows, the hidden states have {batch_size}")
        if start is not None:
            session.truncate(start)
        if length < 1 or cache.position + length > session.room:
            raise ValueError(
                f"The session holds {session.room} tokens, {cache.position} are used; {length} more were sent"
            )
        prompts = self._check_prompts(prompts, session.end - session.start, batch_size)
        if hypo_ids is not None:
            _check_rows(hypo_ids, batch_size)
        with torch.inference_mode():
            if cache.position + length > cache.capacity:
                cache.grow(session.room)
            step = Step(session, hidden, prompts, reordered=hypo_ids is not None, continues=self._continues)
            if hypo_ids is not None:
                try:
                    cache.reorder(hypo_ids)
                except BaseException:
                    step.undo()
                    raise
        return step

    def may_be_taken_up(self, declared: int) -> bool:
        """Whether another session may go on from what one of this declared length has kept, or this one from another's."""
        return self._decoder.table_for(declared) == 0

    def room_beside(self, rows: int) -> int | None:
        """How many rows more may share a pass with so many rows of decodes without another way through the blocks; None: any number."""
        return self._joint.room_beside(rows)

    def companions(self, step: Step) -> tuple[int, int, str, int] | None:
        """Steps for which this is equal can be computed together; None: the step can only be computed alone."""
        if not self._joint.works or step.prompts is not None:
            return None
        session = step.session
        return session.start, session.end, session.adapter, self._decoder.table_for(session.declared)

    def advance(self, pieces: Sequence[tuple[Step, int]]) -> None:
        """Compute the next tokens, at most so many of each row, of steps of different sessions in one pass.

        Of more than one step `companions` must be the same. If it raises, all steps and sessions are as they were.
        """
        session = pieces[0][0].session
        # A decoder asks more of them than a State has.
        caches: list[Any] = [step.session.open_cache for step, _ in pieces]
        self._switch_to(session.adapter)
        with torch.inference_mode(), self._decoder.declared(session.declared):
            step, tokens = pieces[0]
            few = step.session.batch_size * min(tokens, step.left) <= FEW_TOKENS
            short = self._joint.is_lean if few else self._joint.takes_prompts
            if len(pieces) == 1 and not ((short or self._joint.in_pieces) and self.companions(step)):
                hidden, prompts = step.piece(tokens)
                hidden = hidden.to(self.device, self.dtype)
                outputs = [self._decoder.run(hidden, session.start, session.end, caches[0], prompts).cpu()]
            else:
                parts = [(cache, step.piece(tokens)[0]) for cache, (step, tokens) in zip(caches, pieces, strict=True)]
                outputs = self._joint.run(parts, session.start, session.end)
        for (step, _), output in zip(pieces, outputs, strict=True):
            step.took(output)

    def forward(
        self, hidden: torch.Tensor, start: int, end: int, *, prompts: Prompts | None = None, adapter: str = ""
    ) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] through the blocks [start, end), without a cache. `prompts` as in `step`."""
        self._range(start, end)
        self._check_hidden(hidden)
        prompts = self._check_prompts(prompts, end - start, len(hidden))
        self._switch_to(adapter)
        with torch.no_grad():
            return self._decoder.run(hidden.to(self.device, self.dtype), start, end, None, prompts)

    def backward(
        self,
        hidden: torch.Tensor,
        grad_out: torch.Tensor,
        start: int,
        end: int,
        *,
        prompts: Prompts | None = None,
        adapter: str = "",
    ) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
        """Gradients with respect to the inputs of `forward` and to its prompts, whose entries that are None stay None.

        The forward pass is computed anew. The blocks' own weights are frozen.
        """
        self._range(start, end)
        self._check_hidden(hidden)
        prompts = self._check_prompts(prompts, end - start, len(hidden))
        self._switch_to(adapter)
        with torch.enable_grad():
            inputs = hidden.detach().to(self.device, self.dtype).requires_grad_()
            learned = prompts and [
                prompt if prompt is None else prompt.detach().requires_grad_() for prompt in prompts
            ]
            output = self._decoder.run(inputs, start, end, None, learned)
            wanted = [inputs, *(prompt for prompt in learned or () if prompt is not None)]
            grads = iter(torch.autograd.grad(output, wanted, grad_out.to(self.device, self.dtype)))
        grad_hidden = next(grads)
        return grad_hidden, learned and [prompt if prompt is None else next(grads) for prompt in learned]

    def _switch_to(self, adapter: str) -> None:
        """Raises KeyError for an adapter that was not loaded."""
        if self._adapters is not None:
            self._adapters.switch_to(adapter)
        elif adapter:
            raise KeyError(f"This node has no adapter {adapter!r}")

    def _range(self, start: int | None, end: int | None) -> tuple[int, int]:
        start, end = self.start if start is None else start, self.end if end is None else end
        if not self.start <= start < end <= self.end:
            raise ValueError(f"This span has the blocks {self.start}:{self.end}; {start}:{end} is no part of them")
        if not self.cuts.allow(start, end):
            raise ValueError(self.cuts.why_not(start, end))
        return start, end

    def _shapes_of(self, start: int, end: int) -> list[KvShape]:
        return self._shapes[start - self.start : end - self.start]

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        if hidden.ndim != 3 or hidden.shape[-1] != self.row.width:
            raise ValueError(f"Hidden states must be [batch, tokens, {self.row}], not {list(hidden.shape)}")

    def _check_prompts(
        self, prompts: Prompts | None, num_blocks: int, batch_size: int
    ) -> list[torch.Tensor | None] | None:
        if prompts is None or all(prompt is None for prompt in prompts):
            return None
        if not self.row.is_hidden_state:
            raise ValueError("Blocks of this model get more than a hidden state, so that they take no deep prompts")
        if len(prompts) != num_blocks:
            raise ValueError(f"There are prompts for {len(prompts)} blocks, but {num_blocks} blocks")
        for prompt in prompts:
            if prompt is None:
                continue
            if prompt.ndim != 3 or prompt.shape[0] not in (1, batch_size) or prompt.shape[2] != self.row.hidden:
                raise ValueError(
                    f"A prompt must be [1 or {batch_size}, tokens, {self.row.hidden}], not {list(prompt.shape)}"
                )
        return [prompt if prompt is None else prompt.to(self.device, self.dtype) for prompt in prompts]


def _check_rows(hypo_ids: torch.Tensor, batch_size: int) -> None:
    if hypo_ids.shape != (batch_size,) or hypo_ids.dtype != torch.int64:
        raise ValueError(f"hypo_ids must be {batch_size} int64 values, not {list(hypo_ids.shape)} of {hypo_ids.dtype}")
    if not ((hypo_ids >= 0) & (hypo_ids < batch_size)).all():
        raise ValueError(f"hypo_ids must be rows of the session, 0 to {batch_size - 1}")
