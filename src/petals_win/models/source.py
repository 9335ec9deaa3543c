"""Where a model comes from: a Hugging Face id, a local folder, a .gguf file, or the default model.

Knows names and configurations. Does not know spans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as VERSION

from petals_win.errors import UserError
from petals_win.models.architecture import check_supported, empty_model, num_blocks, text_config
from petals_win.models.checkpoint import INDEX, Checkpoint, SafetensorsCheckpoint
from petals_win.models.content import canonical_config, content_id
from petals_win.models.default_model import NAME as DEFAULT_MODEL
from petals_win.models.default_model import default_model_file
from petals_win.models.dequantized import DequantizedCheckpoint
from petals_win.models.four_bits import if_most_in_four
from petals_win.models.gguf_file import GgufCheckpoint
from petals_win.models.gguf_parts import name_of_model
from petals_win.models.hub import HubModel
from petals_win.models.loading import load_whole_model
from petals_win.models.quantized_checkpoint import take_format
from petals_win.models.tokenizer import load_tokenizer

# What llama.cpp's tools put behind a model's name, such as ".Q4_K_M" or "-f16".
_QUANTIZATION = re.compile(r"[.\-_](i?q\d\w*|tq\d\w*|mxfp4\w*|bf16|f16|f32|fp16|fp32)$", re.IGNORECASE)

_LARGEST = 2**40  # of any number in a configuration: beyond it, sizes of tensors overflow


class ModelSource:
    """A model that can be read in parts. Made by `open_model`."""

    def __init__(
        self,
        name: str,
        config: PreTrainedConfig,
        checkpoint: Checkpoint,
        place: str,
        *,
        config_file: Path | None = None,
        repository: HubModel | None = None,
    ) -> None:
        """`place` is where transformers' own from_pretrained() finds the model's small files, with the arguments of `repository` if
        that is the hub; `config_file` is its config.json, None where the checkpoint has the configuration in itself.

        Raises UserError for an architecture that cannot be served, and for weights in a quantized format that is not read.
        """
        check_supported(config)
        packed = take_format(name, config)
        if packed is not None and isinstance(checkpoint, SafetensorsCheckpoint):
            checkpoint = DequantizedCheckpoint(name, checkpoint, packed)
        self.name = name
        self.config = config
        self.checkpoint: Checkpoint = checkpoint
        self._place = place
        self._config_file = config_file
        self.repository = repository
        self._hub_arguments: dict[str, Any] = repository.arguments if repository else {}

    @property
    def token(self) -> str | bool | None:
        """The Hugging Face token that it was opened with."""
        return self._hub_arguments.get("token")

    @property
    def num_blocks(self) -> int:
        return num_blocks(text_config(self.config))

    @property
    def hidden_size(self) -> int:
        return text_config(self.config).hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """In which to compute unless somebody asks for another: that of the weights, or of a quantized GGUF as it says."""
        for config in (self.config, text_config(self.config)):
            if isinstance(config.dtype, torch.dtype):
                return config.dtype
        return self.checkpoint.dtype()

    @property
    def is_quantized_gguf(self) -> bool:
        """Whether `dtype` is a matter of choice, since the weights are stored in fewer bits than any."""
        return isinstance(self.checkpoint, GgufCheckpoint) and self.checkpoint.is_quantized()

    @cached_property
    def in_few_bits(self) -> Mapping[str, int]:
        """By name those weights of blocks that its files have in 4 bits as int4 does, or in 8, if those in 4 are most; else none.

        What else is in such files stays in 16 bits or more when these are kept as they are.
        """
        if isinstance(self.checkpoint, SafetensorsCheckpoint):
            return {}
        model = empty_model(self.config, torch.float32)
        return if_most_in_four(model, self.checkpoint.in_few_bits(model))

    def in_few_bits_on(self, device_type: str) -> Mapping[str, int]:
        """Those of them that stay so on such a device: none but a CPU has a kernel for 8."""
        return {name: bits for name, bits in self.in_few_bits.items() if bits == 4 or device_type == "cpu"}

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
        prefix = re.sub(r"[. ]", "-", self.name)  # upstream refuses spaces, so there is no rule of its for them
        if text_config(self.config).model_type == "llama" and not prefix.endswith("-hf"):
            prefix += "-hf"
        return prefix

    @cached_property
    def content_id(self) -> str:
        """A name for its configuration and weights, the same in any folder. Downloads the weights if they are one file."""
        config = [] if self._config_file is None else [canonical_config(self._config_file)]
        return content_id(text_config(self.config).model_type, *config, *self.checkpoint.content())

    @property
    def swarm_name(self) -> str:
        """Both names by which swarms know the model, as petals_win.swarm.naming reads them."""
        return f"{self.dht_prefix}@{self.content_id}"

    def tokenizer(self) -> Any:
        """The model's tokenizer, with its chat template if it has one."""
        return load_tokenizer(self.name, self._place, text_config(self.config).model_type, **self._hub_arguments)

    def generation_config(self) -> GenerationConfig | None:
        """How the model's makers want it to generate (end tokens, sampling), if they say. Raises UserError if nobody can read it."""
        try:
            return GenerationConfig.from_pretrained(self._place, **self._hub_arguments)
        except Exception as e:  # what its values are is checked in many places of transformers
            if isinstance(e, OSError) and not isinstance(e.__context__, ValueError):
                return None  # there is none
            reason = str(e).strip().splitlines()[0]
            raise UserError(
                f"The generation_config.json of {self.name} is damaged, or asks for what transformers does not accept: {reason} "
                "Download the model again, or delete that file."
            ) from e

    def whole_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model as transformers has it, complete and in this process."""
        return load_whole_model(self, dtype or self.dtype)


def open_model(
    name_or_path: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None
) -> ModelSource:
    """Find a model and read its configuration, but none of its weights.

    `name_or_path` is the name of the default model, a folder with safetensors files, a .gguf file, or an id on the Hugging
    Face hub; `revision`, `token` and `cache_dir` are for the hub. Raises UserError if there is no such model, or none that
    can be served.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{path} is a file, but no .gguf file. Give a .gguf file or a folder with safetensors files."
            )
        return _from_gguf(path)
    if name_or_path == DEFAULT_MODEL:
        return _from_gguf(default_model_file())
    if path.suffix.lower() == ".gguf" or path.is_absolute() or name_or_path.startswith(("./", ".\\", "~")):
        raise UserError(f"There is no file or folder {path}. Check the path.")
    return _from_hub(HubModel(name_or_path, revision, token, cache_dir))


def _from_folder(folder: Path) -> ModelSource:
    if not (folder / "config.json").exists():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"Name the file itself: {ggufs[0]}" if ggufs else "Download the model again, with all of its files"
        raise UserError(f"The folder {folder} has no config.json. {hint}.")

    def locate(name: str) -> Path:
        if not (folder / name).exists():
            raise FileNotFoundError(name)
        return folder / name

    index = folder / INDEX
    checkpoint = SafetensorsCheckpoint(str(folder), locate, index if index.exists() else None)
    name = _name_of_folder(folder.resolve())
    return ModelSource(name, _read_config(folder), checkpoint, str(folder), config_file=folder / "config.json")


def _name_of_folder(folder: Path) -> str:
    """That of the model also where the hub's client keeps it: …/models--OWNER--NAME/snapshots/COMMIT."""
    place = folder.parent.parent.name
    if folder.parent.name == "snapshots" and place.startswith("models--"):
        return place.rpartition("--")[2]
    return folder.name


def _from_gguf(path: Path) -> ModelSource:
    checkpoint = GgufCheckpoint(path)
    name = _QUANTIZATION.sub("", name_of_model(path))
    return ModelSource(name, _read_config(checkpoint.folder), checkpoint, str(checkpoint.folder))


def _from_hub(repository: HubModel) -> ModelSource:
    config_file = repository.file_if_any("config.json")
    if config_file is None:
        raise UserError(
            f"{repository.name} on the Hugging Face hub has no config.json: it is no model for transformers."
        )
    checkpoint = SafetensorsCheckpoint(repository.name, repository.file, repository.file_if_any(INDEX))
    name = repository.name.rpartition("/")[2]
    config = _read_config(config_file.parent)
    return ModelSource(name, config, checkpoint, repository.name, config_file=config_file, repository=repository)


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as e:
        raise UserError(
            f"{folder / 'config.json'} describes its model in a way that transformers does not accept: "
            f"{str(e).strip().splitlines()[-1].strip()}. Download the model again, or choose another."
        ) from e
    except (ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{_reason(folder)} Choose a model that the installed transformers {VERSION} knows.") from e
    for part in (config, text_config(config)):
        for name, value in vars(part).items():
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise UserError(f"{folder / 'config.json'} is damaged: {name} is {value}. Download the model again.")
    return config


def _reason(folder: Path) -> str:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        return f"{folder / 'config.json'} is damaged: it is no JSON, or not an object. Download the model again."
    if "auto_map" in described:
        return (
            f"Models of the type {described.get('model_type')} bring their own Python code, which petals-win does not run, for it "
            "could do anything on this PC."
        )
    return f"Models of the type {described.get('model_type')} are unknown here."
