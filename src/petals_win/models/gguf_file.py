"""A model in a .gguf file, or in the parts of one: its configuration and tokenizer, and its tensors, dequantized one at a time.

Knows the gguf package and the folder in which what it costs seconds to find out is kept for the next time. Does not know spans.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from petals_win.errors import UserError
from petals_win.host.folders import cache_folder
from petals_win.host.locks import hold_lock
from petals_win.models import eight_bits, four_bits
from petals_win.models.architecture import check_supported, empty_model
from petals_win.models.content import gguf_file
from petals_win.models.eight_bits import Scaled
from petals_win.models.four_bits import Groups, Unread
from petals_win.models.gguf_metadata import ROPE_TABLES, read_config
from petals_win.models.gguf_parts import parts_of
from petals_win.models.gguf_tensors import SEVERAL, is_left_out
from petals_win.models.gguf_tokenizer import GgufTokenizer
from petals_win.models.transformers_internals import GgufNames, LazyTensor

logger = logging.getLogger(__name__)

_TABLE = "petals_win_tensors.json"
_FORMAT = 6  # of the description and of how metadata is understood: to be raised whenever a file would be described otherwise
_READ = ("general.", "split.", "tokenizer.")  # the keys that are read besides those of the architecture
_LOCK_SECONDS = 600
_PLAIN = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F32: torch.float32,
}
_SMALL = 2**30  # bytes of a quantized model in float32 up to which it is computed so: a CPU is fastest with it
_PIECE = (
    2**18
)  # values that are dequantized at once: they fit into a processor's cache, and blocks of any type into them
_LARGE = 2**20  # values of a tensor from which on it does not pass through float32 as a whole
_Kept = TypeVar("_Kept", Groups, Scaled)
_LEVELS: dict[int, Mapping[GGMLQuantizationType, Callable[[np.ndarray], tuple[np.ndarray, ...]]]] = {
    4: four_bits.GGUF_TYPES,
    8: eight_bits.GGUF_TYPES,
}
_OTHER_TYPE = "Take another quantization of the model, such as Q4_K_M or Q8_0, or its safetensors files."
_AGAIN = "Download all parts again, into a folder of their own."


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in the file."""

    type: int
    shape: list[int]  # as torch counts, outermost first
    offset: int
    num_bytes: int
    part: int  # counted from 0


class GgufCheckpoint:
    """The tensors of a file, under the names that transformers gives them."""

    def __init__(self, path: Path) -> None:
        """`path` is the file, or the first of its parts.

        Raises UserError if it is damaged, lacks parts or is of an architecture that transformers cannot read.
        """
        self._path = path
        self._parts = parts_of(path)
        self.folder = _description(self._parts)
        table = json.loads((self.folder / _TABLE).read_text(encoding="utf-8"))
        self._architecture: str = table["architecture"]
        self._entries = {name: _Entry(**entry) for name, entry in table["tensors"].items()}

    def tensors(self, model: PreTrainedModel) -> dict[str, LazyTensor]:
        names = _names(self._path, model, self._architecture)
        expected = model.state_dict()
        return {
            target: _Dequantized(self, names, target, found, expected[target].dtype)
            for target, found in self._parts_of(names).items()
        }

    def in_few_bits(self, model: PreTrainedModel) -> Mapping[str, int]:
        names, expected = _names(self._path, model, self._architecture), model.state_dict()
        return {
            target: bits
            for target, found in self._parts_of(names).items()
            if (bits := self.bits_of(found))
            and (order := self.order_of_rows(names, target, found)) is not None
            and order.shape == expected[target].shape[:-1]
        }

    def bits_of(self, names: Iterable[str]) -> int | None:
        """In how many bits all of these tensors are, if their levels can be taken over."""
        types = {self.type_of(name) for name in names}
        return next((bits for bits, known in _LEVELS.items() if types <= known.keys()), None)

    def order_of_rows(self, names: GgufNames, target: str, found: list[str]) -> np.ndarray | None:
        """Which of the rows of the tensors `found`, counted through all of them, is each row of the model's tensor, [..., rows].

        None if the model's is made of them otherwise than by moving rows: that is tried with a single column.
        """
        shapes = {name: self._entries[name].shape[:-1] for name in found}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        columns = {
            name: np.arange(end - math.prod(shape), end).reshape(*shape, 1)
            for (name, shape), end in zip(shapes.items(), ends, strict=True)
        }
        try:
            made = names.convert(columns, target).numpy()
        except ValueError:  # of numpy: columns are told apart
            return None
        seen = np.zeros(ends[-1], dtype=bool)
        seen[made] = True
        return made[..., 0] if made.shape[-1] == 1 and made.size == len(seen) and seen.all() else None

    def _parts_of(self, names: GgufNames) -> dict[str, list[str]]:
        """By the name of each of the model's tensors, those of the file that it is made of."""
        parts: dict[str, list[str]] = {}
        for name in self._entries:
            target = names.target(name)
            if target is not None:
                parts.setdefault(target, []).append(name)
        return parts

    def fetch(self, keys: Iterable[str]) -> None:
        """Everything is in the file."""

    def dtype(self) -> torch.dtype:
        """float16, bfloat16 or float32 if all large tensors are; of quantized ones float32 for a small model, else bfloat16."""
        types = {GGMLQuantizationType(entry.type) for entry in self._entries.values() if len(entry.shape) > 1}
        if len(types) == 1 and (plain := _PLAIN.get(next(iter(types)))):
            return plain
        if not self.is_quantized():
            return torch.float32
        in_float32 = 4 * sum(math.prod(entry.shape) for entry in self._entries.values())
        return torch.float32 if in_float32 <= _SMALL else torch.bfloat16

    def is_quantized(self) -> bool:
        return any(GGMLQuantizationType(entry.type) not in _PLAIN for entry in self._entries.values())

    def content(self) -> Iterable[bytes]:
        for number, path in enumerate(self._parts):
            offsets = [entry.offset for entry in self._entries.values() if entry.part == number]
            yield from gguf_file(path, min(offsets, default=path.stat().st_size))

    def read(self, name: str, dtype: torch.dtype) -> np.ndarray:
        """One tensor of the file: in float32, or a large one in the bits of `dtype` if that has 16, as numbers of 16 bits.

        What is done with large tensors moves values about and never computes with them.
        """
        entry = self._entries[name]
        return _read_tensor(self._parts[entry.part], entry, dtype)

    def type_of(self, name: str) -> GGMLQuantizationType:
        """Of a tensor of the file."""
        return GGMLQuantizationType(self._entries[name].type)

    def rows_and_columns(self, name: str) -> tuple[int, int]:
        """Of a tensor as if it were a matrix."""
        *before, columns = self._entries[name].shape
        return math.prod(before), columns

    def read_levels(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of these rows of a tensor of four or eight bits the levels [rows, columns], and what these bits have for each group [rows, groups].

        Raises UserError if the file is shorter than it was.
        """
        entry = self._entries[name]
        kind, (count, _) = self.type_of(name), self.rows_and_columns(name)
        data = np.empty((len(rows), entry.num_bytes // count), dtype=np.uint8)
        path = self._parts[entry.part]
        with path.open("rb", buffering=0) as file:
            for run in _runs(rows, 1):
                file.seek(entry.offset + int(rows[run.start]) * data.shape[1])
                if file.readinto(data[run].data) != data[run].nbytes:
                    raise UserError(f"{path} ends too early: it has been changed. Download it again.")
        unpacked = next(known for known in _LEVELS.values() if kind in known)[kind]
        return tuple(array.reshape(len(rows), -1) for array in unpacked(data.reshape(-1, GGML_QUANT_SIZES[kind][1])))


def _runs(numbers: np.ndarray, step: int) -> Iterator[slice]:
    """The longest parts in which each number is by `step` more than the one before it."""
    ends = np.flatnonzero(np.diff(numbers) != step) + 1
    return (slice(start, stop) for start, stop in itertools.pairwise([0, *ends.tolist(), len(numbers)]))


class _Dequantized:
    """One tensor of a model, made of one or several of the file."""

    def __init__(
        self, checkpoint: GgufCheckpoint, names: GgufNames, target: str, parts: list[str], dtype: torch.dtype
    ) -> None:
        self._checkpoint, self._names, self._target, self._parts, self._dtype = checkpoint, names, target, parts, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        arrays = {name: self._checkpoint.read(name, self._dtype) for name in self._parts}
        found = self._names.convert(arrays, self._target)
        return (found if found.is_floating_point() else found.view(self._dtype))[index]

    def groups(self) -> Unread[Groups] | None:
        """The same as levels of four bits: rows are moved about as those of the weight itself are."""
        return self._unread(Groups)

    def scaled(self) -> Unread[Scaled] | None:
        """The same as levels of eight bits; None if the file has others."""
        return self._unread(Scaled) if self._checkpoint.bits_of(self._parts) == 8 else None

    def _unread(self, kind: Callable[..., _Kept]) -> Unread[_Kept] | None:
        order = self._checkpoint.order_of_rows(self._names, self._target, self._parts)
        if order is None:
            return None
        sizes = [self._checkpoint.rows_and_columns(name) for name in self._parts]
        starts = np.cumsum([0, *(rows for rows, _ in sizes[:-1])])

        def read(rows: np.ndarray) -> _Kept:
            part = np.searchsorted(starts, rows, side="right") - 1
            pieces = (
                self._checkpoint.read_levels(self._parts[part[run.start]], rows[run] - starts[part[run.start]])
                for run in _runs(part, 0)
            )
            return kind(*(torch.from_numpy(np.concatenate(each)) for each in zip(*pieces, strict=True)))

        return Unread(order, sizes[0][1], read)


def _description(parts: list[Path]) -> Path:
    """A folder with config.json, the tokenizer's files and a table of the tensors, made at the first use of the file.

    The gguf package parses the file's metadata, with the whole vocabulary, in Python: seconds of time and 150 MB of memory
    that no later start has to spend.
    """
    path, stats = parts[0], [part.stat() for part in parts]
    size = sum(stat.st_size for stat in stats)
    versions = "|".join(f"{stat.st_size}|{stat.st_mtime_ns}" for stat in stats)
    key = f"{path.resolve()}|{versions}|{transformers.__version__}|{_FORMAT}"
    parent = cache_folder() / "gguf"
    parent.mkdir(exist_ok=True)
    folder = parent / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with hold_lock(parent / f"{folder.name}.lock", f"the reading of {path.name}", timeout=_LOCK_SECONDS):
        if not folder.exists():
            began = time.perf_counter()
            logger.info("Reading the description of %s (%.0f MB); this is done once", path.name, size / 1e6)
            unfinished = parent / f"{folder.name}.part"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _describe(parts, unfinished)
            unfinished.rename(folder)
            logger.info("Read the description of %s in %.1f s", path.name, time.perf_counter() - began)
    return folder


def _describe(parts: list[Path], folder: Path) -> None:
    path = parts[0]
    metadata, entries = _contents(path, 0)
    architecture = metadata["general.architecture"]
    for number, part in enumerate(parts[1:], start=1):
        further, tensors = _contents(part, number, architecture)
        _check_part(part, further, number, len(parts))
        if twice := sorted(entries.keys() & tensors.keys()):
            raise UserError(f"{part.name} has the tensor {twice[0]} once more: it is no part of {path.name}. {_AGAIN}")
        entries |= tensors
    _check_part(path, metadata, 0, len(parts))
    if (wanted := metadata.get("split.tensors.count", len(entries))) != len(entries):
        raise UserError(
            f"{path.name} and its further parts have {len(entries)} tensors where it says {wanted}: they belong to different models. "
            f"{_AGAIN}"
        )
    _refuse_types(path, entries)
    for name in SEVERAL:
        if (stacked := entries.pop(f"{name}.weight", None)) is not None:
            entries |= {f"{name}.{index}.weight": part for index, part in enumerate(_unstacked(stacked))}
    tables = {
        name: _read_tensor(parts[entry.part], entry).astype(np.float64)
        for name, entry in entries.items()
        if name in ROPE_TABLES
    }
    try:
        config = read_config(metadata, {name: entry.shape for name, entry in entries.items()}, tables)
    except UserError as e:
        raise UserError(f"{path.name} cannot be read. {e}") from e
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as e:
        raise UserError(
            f"{path.name} describes its model in a way that transformers does not accept: {str(e).strip().splitlines()[-1]} "
            "Use the model's safetensors files instead."
        ) from e
    check_supported(config)
    _refuse_unused(path, config, architecture, entries)
    tokenizer = GgufTokenizer(path.name, metadata, config.vocab_size)
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = tokenizer.ends() or None
    generation.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)
    table = {"architecture": architecture, "tensors": {name: asdict(entry) for name, entry in entries.items()}}
    (folder / _TABLE).write_text(json.dumps(table), encoding="utf-8")


def _contents(path: Path, number: int, architecture: str | None = None) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """The keys of a file, those of the tokenizer included, and its tensors. Only a first part names the architecture."""
    try:
        reader = GGUFReader(path)
        architecture = architecture or str(reader.fields["general.architecture"].contents())
        entries = {
            tensor.name: _Entry(
                int(tensor.tensor_type),
                [int(n) for n in reversed(tensor.shape)],
                int(tensor.data_offset),
                int(tensor.n_bytes),
                number,
            )
            for tensor in reader.tensors
        }
        read = (f"{architecture}.", *_READ)
        return {key: field.contents() for key, field in reader.fields.items() if key.startswith(read)}, entries
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as e:
        if unknown := re.search(rf"(\d+)\)? is not a valid {GGMLQuantizationType.__name__}", str(e)):
            raise UserError(
                f"{path.name} has tensors of the type number {unknown[1]}, which nobody knew when this version of petals-win was made, "
                f"or it is damaged. {_OTHER_TYPE}"
            ) from e
        raise UserError(
            f"{path} is no complete GGUF file ({path.stat().st_size:,} bytes): it is damaged or was not downloaded to its end. "
            "Download it again."
        ) from e


def _unstacked(entry: _Entry) -> list[_Entry]:
    """The tensors that lie one behind the other in one of a dimension more."""
    count, *shape = entry.shape
    size = entry.num_bytes // count
    return [replace(entry, shape=shape, offset=entry.offset + index * size, num_bytes=size) for index in range(count)]


def _check_part(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    said = metadata.get("split.count", 1) or 1
    if said != count and count == 1:
        raise UserError(
            f"{path.name} is one of {said} parts of a model, but its name does not tell the others. Give them the names that they "
            f"had, which end with -00001-of-{said:05}.gguf and so on, and name the first."
        )
    if said != count or metadata.get("split.no", number) != number:
        raise UserError(
            f"{path.name} says that it is part {metadata.get('split.no', 0) + 1} of {said}, but its name says {number + 1} of "
            f"{count}: it was renamed, or belongs to another model. {_AGAIN}"
        )


def _refuse_types(path: Path, entries: Mapping[str, _Entry]) -> None:
    """Types of numbers that the gguf package can name, but not turn into plain ones."""
    tried: set[int] = set()
    for name, entry in entries.items():
        if entry.type in tried:
            continue
        tried.add(entry.type)
        kind = GGMLQuantizationType(entry.type)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as e:
            raise UserError(
                f"{path.name} has the tensor {name} in the type {kind.name}, which petals-win cannot read. {_OTHER_TYPE}"
            ) from e


def _refuse_unused(path: Path, config: PreTrainedConfig, architecture: str, entries: Iterable[str]) -> None:
    """A tensor that the model has no place for would be left out of the computation without a word."""
    names = _names(path, empty_model(config, torch.float32), architecture)
    unused = sorted(
        name
        for name in entries
        if name not in ROPE_TABLES and names.target(name) is None and not is_left_out(config, name)
    )
    if unused:
        others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise UserError(
            f"{path.name} has the tensor {unused[0]}{others}, for which transformers' {config.model_type} has no place. "
            "Use the model's safetensors files instead."
        )


def _names(path: Path, model: PreTrainedModel, architecture: str) -> GgufNames:
    try:
        return GgufNames(model, architecture)
    except NotImplementedError as e:
        raise UserError(
            f"The tensors of {path.name} cannot be read: its architecture is {architecture}. "
            "Use the model's safetensors files instead."
        ) from e


def _read_tensor(path: Path, entry: _Entry, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """As GgufCheckpoint.read. A large tensor is read in pieces, so that little more than the result is in memory."""
    kind = GGMLQuantizationType(entry.type)
    values_of_block, bytes_of_block = GGML_QUANT_SIZES[kind]
    large = len(entry.shape) > 1 and math.prod(entry.shape) >= _LARGE
    short = large and dtype.itemsize == 2
    found = torch.empty(math.prod(entry.shape), dtype=dtype if short else torch.float32)
    with path.open("rb") as file:
        file.seek(entry.offset)
        for piece in found.split(_PIECE):
            count = piece.numel() // values_of_block * bytes_of_block
            data = np.fromfile(file, dtype=np.uint8, count=count)
            piece.copy_(torch.from_numpy(dequantize(data.reshape(1, -1), kind)).view(-1))
    return (found.view(torch.int16) if short else found).view(entry.shape).numpy()
