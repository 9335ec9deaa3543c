"""The tensors of a checkpoint, read one at a time from safetensors files.

Knows the safetensors format and the index of a sharded checkpoint. Does not know models or where the files come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from petals_win.errors import UserError
from petals_win.models.content import canonical, safetensors_file
from petals_win.models.quantized_checkpoint import refuse_dtype
from petals_win.models.transformers_internals import LazyTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint(Protocol):
    """Tensors by name. The names are the checkpoint's own; transformers maps them to the model's."""

    def tensors(self, model: PreTrainedModel) -> dict[str, LazyTensor]:
        """Every tensor that `model` may need, unread."""
        ...

    def fetch(self, keys: Iterable[str]) -> None:
        """Make sure that these tensors can be read without a network.

        Raises UserError if one is stored as numbers of eight bits or fewer, which mean nothing without a scale.
        """
        ...

    def dtype(self) -> torch.dtype:
        """In which to compute unless somebody asks for another: that of the weights as they are stored, if they are plain."""
        ...

    def in_few_bits(self, model: PreTrainedModel) -> Mapping[str, int]:
        """By the model's names those weights that it has in 4 bits, as 16 equal steps for each group, or in 8, told before anything is read.

        The tensors of these may have `groups()`, as four_bits.Groups, or `scaled()`, as eight_bits.Scaled; one that has none is plain after all.
        """
        ...

    def content(self) -> Iterable[bytes]:
        """What copies of this checkpoint have in common and others do not, for petals_win.models.content."""
        ...


class SafetensorsCheckpoint:
    """One file, or the shards that an index names."""

    def __init__(self, origin: str, locate: Callable[[str], Path], index: Path | None) -> None:
        """`locate` gives the path of a file by its name, downloading it if need be, or raises FileNotFoundError; `index` is the
        path of the index of a sharded checkpoint, None for a single file; `origin` names it all to the user.

        Raises UserError if the index is damaged.
        """
        self._origin = origin
        self._locate = locate
        self._file_of: dict[str, str] | None = None
        self._open: dict[str, Any] = {}
        if index is not None:
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if not self._file_of or not all(isinstance(name, str) and name for name in self._file_of.values()):
                    raise ValueError("no names of files")
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(
                    f"{index} is damaged: it is no index of safetensors files. Download the model again."
                ) from e

    def tensors(self, model: PreTrainedModel) -> dict[str, LazyTensor]:
        if self._file_of is None:
            return {key: _Stored(self, SINGLE, key) for key in self._file(SINGLE).keys()}
        return {key: _Stored(self, file, key) for key, file in self._file_of.items()}

    def fetch(self, keys: Iterable[str], packed: Collection[str] = ()) -> None:
        """Those of `keys` that are in `packed` may be of eight bits and fewer, since whoever asks knows their scales."""
        keys_of: dict[str, list[str]] = {}
        for key in keys:
            keys_of.setdefault(SINGLE if self._file_of is None else self._file_of[key], []).append(key)
        for name in sorted(keys_of):
            for key in keys_of[name]:
                stored = self._reading(name, key, lambda file, key: file.get_slice(key).get_dtype())
                if key not in packed and stored.startswith(_TOO_SMALL):
                    raise refuse_dtype(self._origin, key, stored)

    def dtype(self) -> torch.dtype:
        name = SINGLE if self._file_of is None else min(self._file_of.values())
        file = self._file(name)
        for key in file.keys():
            dtype = _DTYPES.get(file.get_slice(key).get_dtype())
            if dtype is not None:
                return dtype
        return torch.float32

    def in_few_bits(self, model: PreTrainedModel) -> Mapping[str, int]:
        return {}

    def read(self, name: str, key: str) -> torch.Tensor:
        """Raises UserError if the file does not hold what its index or header says."""
        return self._reading(name, key, lambda file, key: file.get_tensor(key))

    def _reading(self, name: str, key: str, get: Callable[[Any, str], Any]) -> Any:
        try:
            return get(self._file(name), key)
        except SafetensorError as e:
            raise UserError(
                f"{self._locate(name)} does not contain the tensor {key}: the file and the index belong to different versions of "
                "the model. Download the model again."
            ) from e

    def content(self) -> Iterable[bytes]:
        if self._file_of is not None:
            return [canonical(self._file_of)]
        self._file(SINGLE)  # says what is wrong with it
        return safetensors_file(self._locate(SINGLE))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                path = self._locate(name)
            except FileNotFoundError as e:
                raise UserError(self._lacks(name)) from e
            try:
                # Reading, not mapping: on Windows a mapping reserves memory for the whole file.
                self._open[name] = safe_open(path, framework="pt", backend="pread")
            except SafetensorError as e:
                raise UserError(
                    f"{path} is damaged or was not downloaded to its end ({path.stat().st_size:,} bytes). Delete it and download "
                    "the model again."
                ) from e
        return self._open[name]

    def _lacks(self, name: str) -> str:
        if self._file_of is not None:
            return f"{self._origin} lacks the file {name}. Download the model again, with all of its files."
        for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            try:
                self._locate(pickled)
            except FileNotFoundError:
                continue
            return (
                f"{self._origin} has its weights as {pickled} only. Such files can run any code when they are opened, so petals-win "
                "does not read them. Choose a version of the model with safetensors files."
            )
        return f"{self._origin} has no weights: there is neither {SINGLE} nor {INDEX}. Download the model again, with all of its files."


class _Stored:
    """One tensor in one file."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, file: str, key: str) -> None:
        self._checkpoint, self._file, self._key = checkpoint, file, key

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.read(self._file, self._key)[index]


_TOO_SMALL = ("F8", "F6", "F4", "E8M0")  # the beginnings of safetensors' names for them
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
