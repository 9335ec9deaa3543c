"""Where a model comes from: a Hugging Face id, a local folder, a .gguf file, or the default model.

Knows names, configurations and tokenizers. Does not know spans.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from petals_win.errors import UserError
from petals_win.span.architecture import check_supported, text_config
from petals_win.span.checkpoint import INDEX, SINGLE, Checkpoint, SafetensorsCheckpoint

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class ModelSource:
    """A model that can be read in parts. Made by `open_model`."""

    def __init__(self, name: str, config: PreTrainedConfig, checkpoint: Checkpoint, pretrained: dict[str, Any]) -> None:
        """`pretrained` are the arguments with which transformers' own from_pretrained() finds the same model."""
        check_supported(config)
        self.name = name
        self.config = config
        self.checkpoint = checkpoint
        self._pretrained = pretrained

    @property
    def num_blocks(self) -> int:
        return text_config(self.config).num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return text_config(self.config).hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the checkpoint's weights; float32 if they are quantized."""
        dtype = text_config(self.config).dtype or self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else self.checkpoint.dtype()

    @property
    def context_length(self) -> int:
        """How many tokens the model was made for."""
        config = text_config(self.config)
        for name in ("max_position_embeddings", "seq_length", "max_seq_len"):
            if isinstance(length := getattr(config, name, None), int):
                return length
        return 2048

    @property
    def dht_prefix(self) -> str:
        """What the keys of this model's blocks begin with in a swarm; the same rule as upstream's, so that both meet."""
        prefix = self.name.replace(".", "-")
        if text_config(self.config).model_type == "llama" and not prefix.endswith("-hf"):
            prefix += "-hf"
        return prefix

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(**self._pretrained)

    def whole_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model as transformers itself loads it, in this process."""
        return AutoModelForCausalLM.from_pretrained(**self._pretrained, dtype=dtype or self.dtype).eval()


def open_model(
    name_or_path: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None
) -> ModelSource:
    """Find a model and read its configuration, but none of its weights.

    Raises UserError if there is no such model, or one that cannot be served.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _from_folder(path)
    raise UserError(f"There is no model {name_or_path!r}.")


def _from_folder(folder: Path) -> ModelSource:
    config = AutoConfig.from_pretrained(folder)
    index = folder / INDEX
    checkpoint = SafetensorsCheckpoint(folder.joinpath, index if index.exists() else None)
    return ModelSource(folder.resolve().name, config, checkpoint, {"pretrained_model_name_or_path": str(folder)})
