"""The parts of transformers that are not a stable API: the loading of single tensors, and what it knows about GGUF files and tokenizers.

Knows which functions of transformers load a tensor into a model, renaming, splitting or fusing it on the way, which map
the names and build the tokenizers of GGUF files, and which read ranks of tiktoken. Does not know what a span is. Everything else in this room goes through public names, so when a new transformers breaks the loading, it
breaks here, and tests/models/test_transformers_internals.py says so first.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from petals_win.models.architecture import text_config
from petals_win.models.gguf_tensors import further_names, restored


class LazyTensor(Protocol):
    """A tensor of a checkpoint that is read from its file when it is indexed with `...`."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class Loader:
    """Puts checkpoint tensors into the parameters of a model whose parameters are on the meta device."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        self._expected = model.state_dict()
        self._computed = frozenset(name for name, _ in model.named_buffers()) - self._expected.keys()
        self.expected_names = frozenset(self._expected)

    def target(self, checkpoint_key: str) -> str:
        """The name in the model that this checkpoint key ends up under; of several, the first. May be unknown to the model."""
        prefix = self._model.base_model_prefix
        name, _ = rename_source_key(checkpoint_key, self._renamings, self._converters, prefix, self._expected)
        if name not in self._expected and checkpoint_key in self._expected:
            name, _ = rename_source_key(checkpoint_key, [], [], prefix, self._expected)
        return name

    def is_as_it_is(self, checkpoint_key: str) -> bool:
        """Whether this key becomes a parameter by itself and unchanged, but perhaps under another name."""
        prefix = self._model.base_model_prefix
        name, converter = rename_source_key(checkpoint_key, self._renamings, self._converters, prefix, self._expected)
        return converter is None or (name not in self._expected and checkpoint_key in self._expected)

    def load(self, tensors: Mapping[str, LazyTensor], device: torch.device) -> set[str]:
        """Read `tensors` (by checkpoint key) one after the other into the model on `device`.

        Returns the names in the model that they filled. Raises ValueError, with the name, for a tensor of a wrong shape or one
        that cannot be converted.
        """
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,  # pyright: ignore[reportArgumentType]
        )
        with _one_tensor_at_a_time():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        for name, found, wanted in sorted(info.mismatched_keys, key=lambda entry: entry[0]):
            raise ValueError(f"{name} has the shape {list(found)} where the model needs {list(wanted)}")
        for name, error in sorted(info.conversion_errors.items()):
            raise ValueError(f"{name} cannot be converted: {error.strip().splitlines()[-1]}")
        return set(self.expected_names) - set(info.missing_keys)

    def takes_numbers(self, name: str) -> bool:
        """Whether `name` in the model is a tensor of floating-point numbers."""
        expected = self._expected.get(name)
        return expected is not None and expected.is_floating_point()

    def may_be_left_over(self, name: str) -> bool:
        """Whether transformers loads this model without a word when the checkpoint has `name`, which the model lacks."""
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        return name in self._computed or any(re.search(pattern, name) for pattern in patterns)

    def may_be_missing(self, name: str) -> bool:
        """Whether transformers loads this model without a word when the checkpoint lacks `name`."""
        return any(re.search(pattern, name) for pattern in self._model._keys_to_ignore_on_load_missing or ())


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Without this, transformers reads ahead in four threads: memory for four tensors, and torch work outside our thread."""
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(variable)
    bars = transformers_logging.is_progress_bar_enabled()
    os.environ[variable] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


class GgufNames:
    """Which tensors of a GGUF file make up which parameter of a model, and how."""

    def __init__(self, model: PreTrainedModel, architecture: str) -> None:
        """`architecture` is the file's `general.architecture`. Raises NotImplementedError if it has no mapping."""
        config = text_config(model.config)
        self._architecture, self._model_type = architecture, config.model_type
        self._config = config.to_dict()
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._config)
        names: Any = _ParameterNames(model, depth=2)
        mapped: dict[str, str] = get_gguf_hf_weights_map(names, self._processor, architecture)
        self._targets = {**further_names(self._model_type, model.state_dict()), **mapped}

    def target(self, gguf_name: str) -> str | None:
        """The model's name of what this tensor is, or is a part of; None if the model has no use for it."""
        return self._targets.get(gguf_name) or self._targets.get(gguf_name.removesuffix(".weight"))

    def convert(self, parts: Mapping[str, np.ndarray], target: str) -> torch.Tensor:
        """The model's tensor `target` from the dequantized tensors it is made of, by their names in the file."""
        weights = restored(self._architecture, self._model_type, self._config, target, parts)
        if weights is not None:
            return torch.from_numpy(np.ascontiguousarray(weights))
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for name, weights in parts.items():
            result = self._processor.process(
                weights=weights, name=name, tensor_key_mapping=self._targets, parsed_parameters=parsed
            )
            if result.name is not None:
                parsed["tensors"][target] = torch.from_numpy(np.ascontiguousarray(result.weights))
        return parsed["tensors"][target]


class _ParameterNames:
    """As much of a module as the mapping looks at.

    Given the module itself, it would go through all modules of all blocks, which takes minutes for a large model and finds
    nothing: no name without the number of its block can be mapped.
    """

    def __init__(self, module: Any, depth: int) -> None:
        self.config = module.config
        self._module = module
        self._depth = depth

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _ParameterNames]]:
        children = self._module.named_children() if self._depth else ()
        return [
            (name, _ParameterNames(child, self._depth - 1)) for name, child in children if hasattr(child, "config")
        ]


def inverse_frequencies(config: PreTrainedConfig) -> np.ndarray:
    """Of the rotary embedding with which a model of this configuration computes, half as many as rotated dimensions."""
    rope = config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies.numpy()


def sentencepiece_backend(architecture: str, vocabulary: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file of pieces of sentencepiece, as transformers builds it from these entries."""
    return convert_gguf_tokenizer(architecture, vocabulary)[0]


def pre_tokenizer_split(name: str) -> str | None:
    """The regular expression by which words are told apart under this `tokenizer.ggml.pre`, if transformers knows one."""
    return GGUF_PRE_TOKENIZER_SPLITS.get(name)


def small_file(place: str, name: str, hub_arguments: Mapping[str, Any]) -> Path | None:
    """A file beside a model, where from_pretrained() would find it; None if there is none."""
    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(place, name, **quiet, **hub_arguments)
    return None if found is None else Path(found)


def are_ranks(path: Path) -> bool:
    """Whether a tokenizer's file is one of tiktoken, by its first line."""
    with path.open("rb") as file:
        return _RANK.fullmatch(file.readline(_LONGEST_LINE)) is not None


_RANK = re.compile(rb"([A-Za-z0-9+/]+=*) (\d+)\r?\n?")
_LONGEST_LINE = 2**16  # bytes; a token has up to some hundred


def _ranks(tiktoken_url: str) -> dict[bytes, int]:
    """By the bytes of each token its number. Raises ValueError if a line is none, or a single byte is no token."""
    path, ranks = tiktoken_url, dict[bytes, int]()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line:
            continue
        found = _RANK.fullmatch(line)
        try:
            token = base64.b64decode(found[1], validate=True) if found else b""
        except binascii.Error:
            token = b""
        if not found or not token or token in ranks:
            raise ValueError(f"line {number} of {path} is no rank of tiktoken, or the same token again")
        ranks[token] = int(found[2])
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path} has no token for the byte {lacking[0]}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} leaves out numbers of tokens, or has one twice")
    return ranks


TikTokenConverter.load_tiktoken_bpe = staticmethod(_ranks)  # otherwise it wants a package for these lines
