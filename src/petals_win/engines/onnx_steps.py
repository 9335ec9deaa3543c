"""How an ONNX model goes on with the tokens of many answers, and where it keeps what they have left in its caches.

Two ways of one protocol. `BatchedSteps` runs the graph itself, the next tokens of all answers in one pass; for CPUs, and
graphs whose caches are plain. `OneByOneSteps` leaves all to a Generator of ONNX Runtime GenAI for each answer, which knows what each
device wants. Knows graphs and memory. Does not know how a token is chosen, nor who waits for one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from petals_win.engines.onnx_rows import CacheRow, Row, RowCaches
from petals_win.errors import UserError
from petals_win.models.onnx_folder import OnnxFolder

logger = logging.getLogger(__name__)

MISSING = "The package for it is not installed. Install it with: pip install petals-win[onnx]"
_SMALLEST = 256  # tokens that an answer gets room for at first
_NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_CACHE_DIMENSIONS = 4  # [batch, heads, tokens, head size]
# What one graph computes for the same tokens in two ways differs by rounding alone: of the largest logit.
_SAME = 0.05


class Steps(Protocol):
    """The answers' tokens so far, each in a Row, and what comes next. Used by one thread."""

    budget: int  # bytes for all rows
    at_once: int  # rows for which a call of `next` is of use

    @property
    def held(self) -> int:
        """Bytes that rows take."""
        ...

    @property
    def token_bytes(self) -> int: ...

    def open(self, tokens: int) -> Row | None:
        """A row with room for so many tokens; None if there is no memory for it now."""
        ...

    def grow(self, row: Row, tokens: int) -> Row | None:
        """The row with more room, in the place of `row`; None if there is no memory for it now, and the row is as it was."""
        ...

    def close(self, row: Row) -> None: ...

    def read(self, row: Row, tokens: Sequence[int]) -> torch.Tensor:
        """Go on with tokens for which the row has room. Returns the logits after the last, [1, vocabulary]."""
        ...

    def next(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        """Go on with one token for each row. Returns the logits after it, [rows, vocabulary]."""
        ...


def open_steps(folder: OnnxFolder, threads: int, budget: Callable[[int], int]) -> Steps:
    """Load the graph; `budget` gives the bytes that rows may take, by those that a token takes.

    Raises UserError if ONNX Runtime is not installed, or cannot do anything with the graph.
    """
    if folder.device == "cpu" and folder.plain:
        steps = BatchedSteps.of(folder, threads, budget)
        if steps is not None:
            return steps
        logger.info("%s is computed one answer after the other, since its graph takes no batches", folder.name)
    return OneByOneSteps(folder, threads, budget)


def room_for(tokens: int, longest: int) -> int:
    """How many tokens a row gets room for that needs so many, and may have `longest`: powers of two, so that few are moved."""
    return min(max(_SMALLEST, 1 << (tokens - 1).bit_length()), longest)


class BatchedSteps:
    """The graph in a session of ONNX Runtime. Rows with as much room are one batch."""

    at_once = 2**16

    def __init__(self, session: Any, folder: OnnxFolder, budget: Callable[[int], int]) -> None:
        self._session, self._vocabulary, self._longest = session, folder.vocabulary, folder.context_length
        caches = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]
        self._past = [each.name for each in caches]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        self._dtype = _NUMBERS[caches[0].type]
        self._shapes = [(each.shape[1], each.shape[3]) for each in caches]
        heads = folder.cache_numbers // (2 * folder.num_layers)
        self._shapes = [
            (shape[0], shape[1] if isinstance(shape[1], int) else heads // shape[0]) for shape in self._shapes
        ]
        self.token_bytes = sum(heads * size for heads, size in self._shapes) * np.dtype(self._dtype).itemsize
        self.budget = budget(self.token_bytes)
        self._caches: dict[int, RowCaches] = {}  # by the room of their rows

    @classmethod
    def of(cls, folder: OnnxFolder, threads: int, budget: Callable[[int], int]) -> BatchedSteps | None:
        """None if the graph wants more than tokens and plain caches, or computes a batch otherwise than its rows alone."""
        session = _session(folder, threads)
        inputs = {each.name: each for each in session.get_inputs()}
        caches = [f"past_key_values.{layer}.{what}" for layer in range(folder.num_layers) for what in ("key", "value")]
        if set(inputs) != {"input_ids", "attention_mask", *caches}:
            return None
        shapes = [inputs[name].shape for name in caches]
        if any(len(shape) != _CACHE_DIMENSIONS or not isinstance(shape[1], int) for shape in shapes):
            return None
        if len(types := {inputs[name].type for name in caches}) != 1 or not types <= set(_NUMBERS):
            return None
        steps = cls(session, folder, budget)
        return steps if steps._computes_rows_as_alone() else None

    @property
    def held(self) -> int:
        return sum(caches.nbytes for caches in self._caches.values())

    def open(self, tokens: int) -> CacheRow | None:
        return self._opened(tokens, freed=0)

    def _opened(self, tokens: int, freed: int) -> CacheRow | None:
        """`freed` are bytes that are given back right afterwards."""
        room = room_for(tokens, self._longest)
        caches = self._caches.get(room) or RowCaches(room, self._shapes, self._dtype)
        if self.held + caches.nbytes_for_one_more - freed > self.budget:
            return None
        self._caches[room] = caches
        return caches.add()

    def grow(self, row: Row, tokens: int) -> CacheRow | None:
        assert isinstance(row, CacheRow)
        if tokens <= row.room:
            return row
        larger = self._opened(tokens, freed=row.room * self.token_bytes)
        if larger is not None:
            larger.caches.copy(larger, row)
            self.close(row)
        return larger

    def close(self, row: Row) -> None:
        assert isinstance(row, CacheRow)
        caches = row.caches
        caches.remove(row)
        if not caches.rows:
            del self._caches[caches.room]

    def read(self, row: Row, tokens: Sequence[int]) -> torch.Tensor:
        assert isinstance(row, CacheRow)
        logits = self._run(
            row.caches, slice(row.number, row.number + 1), np.array([tokens]), [row.length + len(tokens)]
        )
        row.length += len(tokens)
        return logits

    def next(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        found: dict[Row, torch.Tensor] = {}
        token_of = dict(zip(rows, tokens, strict=True))
        for caches in list(self._caches.values()):
            asked = [row for row in caches.rows if row in token_of]
            if not asked:
                continue
            caches.put_first(asked)
            lengths = [row.length + 1 for row in asked]
            ids = np.array([[token_of[row]] for row in asked])
            found.update(zip(asked, self._run(caches, slice(0, len(asked)), ids, lengths), strict=True))
            for row in asked:
                row.length += 1
        return torch.stack([found[row] for row in rows])

    def _run(self, caches: RowCaches, part: slice, ids: np.ndarray, lengths: Sequence[int]) -> torch.Tensor:
        """`ids` [rows, tokens] are the last of so many `lengths` tokens. Returns the last ones' logits [rows, vocabulary]."""
        mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids.astype(np.int64))
        binding.bind_cpu_input("attention_mask", mask)
        for past, present, cache in zip(self._past, self._present, caches.arrays, strict=True):
            some = cache[part]
            # The graph writes into what it reads: nothing is copied.
            where = ("cpu", 0, self._dtype, some.shape, some.ctypes.data)
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()[:, -1, : self._vocabulary]
        return torch.from_numpy(logits.astype(np.float32))

    def _computes_rows_as_alone(self) -> bool:
        """Try it: two texts of different lengths, as a whole each and by a batch."""
        texts = [[number % self._vocabulary for number in range(1, 1 + length)] for length in (9, 4)]
        if max(map(len, texts)) > self._longest:
            return False
        expected = torch.cat([self._alone(text) for text in texts])
        rows = [row for text in texts if (row := self.open(len(text))) is not None]
        if len(rows) < len(texts):
            raise _no_memory()
        for row, text in zip(rows, texts, strict=True):
            self.read(row, text[:2])
            self.read(row, text[2:-1])
        together = self.next(rows, [text[-1] for text in texts])
        for row in rows:
            self.close(row)
        return bool((together - expected).abs().max() <= _SAME * expected.abs().max())

    def _alone(self, text: Sequence[int]) -> torch.Tensor:
        row = self.open(len(text))
        if row is None:
            raise _no_memory()
        try:
            return self.read(row, text)
        finally:
            self.close(row)


def _no_memory() -> UserError:
    return UserError("This PC has no memory left for conversations. Close other programs, or choose a smaller model.")


def _session(folder: OnnxFolder, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise UserError(MISSING) from e
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads wait for one another awake within a step, and not between two.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(folder.graph), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # of classes that ONNX Runtime does not name
        raise _cannot_load(folder, e) from e


def _cannot_load(folder: OnnxFolder, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"ONNX Runtime cannot load the model in {folder.path}: {reason} If its files are complete, and this PC has the memory, convert "
        "the model again with 'petals-win convert'."
    )


@dataclass(eq=False)
class _Generated(Row):
    """A Row that is a Generator's."""

    generator: Any = None
    tokens: list[int] = field(default_factory=list)


class OneByOneSteps:
    """A Generator for each row, of any device. What has to grow is computed again."""

    at_once = 1

    def __init__(self, folder: OnnxFolder, threads: int, budget: Callable[[int], int]) -> None:
        try:
            import onnxruntime_genai
        except ImportError as e:
            raise UserError(MISSING) from e
        genai: Any = onnxruntime_genai  # it has no types
        self._genai, self._vocabulary, self._longest = genai, folder.vocabulary, folder.context_length
        genai.disable_telemetry_events()
        try:
            config = genai.Config(str(folder.path))
            if folder.device == "cpu":
                sessions = f'{{"intra_op_num_threads": {threads}}}'
                config.overlay(f'{{"model": {{"decoder": {{"session_options": {sessions}}}}}}}')
            self._model = genai.Model(config)
        except Exception as e:
            raise _cannot_load(folder, e) from e
        self.token_bytes = folder.cache_numbers * (4 if folder.device == "cpu" else 2)
        self.budget = budget(self.token_bytes)
        self._room = 0

    @property
    def held(self) -> int:
        return self._room * self.token_bytes

    def open(self, tokens: int) -> Row | None:
        room = room_for(tokens, self._longest)
        if self.held + room * self.token_bytes > self.budget:
            return None
        self._room += room
        return _Generated(room, generator=self._generator(room))

    def _generator(self, room: int) -> Any:
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=room, batch_size=1)
        return self._genai.Generator(self._model, settings)

    def grow(self, row: Row, tokens: int) -> Row | None:
        assert isinstance(row, _Generated)
        room = room_for(tokens, self._longest)
        if tokens <= row.room:
            return row
        if self.held + (room - row.room) * self.token_bytes > self.budget:
            return None
        self._room += room - row.room
        row.room, row.generator = room, None  # the old one's memory first
        row.generator = self._generator(room)
        row.generator.append_tokens(np.array(row.tokens, dtype=np.int32))
        return row

    def close(self, row: Row) -> None:
        assert isinstance(row, _Generated)
        self._room -= row.room
        row.generator = None

    def read(self, row: Row, tokens: Sequence[int]) -> torch.Tensor:
        assert isinstance(row, _Generated)
        row.generator.append_tokens(np.array(tokens, dtype=np.int32))
        row.tokens += tokens
        row.length += len(tokens)
        logits = np.asarray(row.generator.get_logits())[:, -1, : self._vocabulary]
        return torch.from_numpy(logits.astype(np.float32))

    def next(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        return torch.cat([self.read(row, [token]) for row, token in zip(rows, tokens, strict=True)])
