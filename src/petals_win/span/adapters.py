"""LoRA adapters on the blocks of a span, computed by peft: loaded once, switched on for single requests.

Knows peft and where an adapter's files are. Does not know sessions or networks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import nn

from petals_win.errors import UserError
from petals_win.models.hub import HubModel

logger = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_WRAPPED = "base_model.model."  # what peft puts before the names in a model that it saves


class Adapters:
    """The adapters of a span. At any moment one of them is on, or none; weights are frozen."""

    def __init__(self, layers: Sequence[nn.Module], first: int, prefix: str, num_blocks: int) -> None:
        """`layers` are the blocks first, first + 1, … of the model's `num_blocks`; parameters are named `prefix` and their number."""
        self._prefix = prefix
        self._num_blocks = num_blocks
        self._numbers = range(first, first + len(layers))
        self._root = _tree(prefix, {str(number): layer for number, layer in zip(self._numbers, layers, strict=True)})
        self._keys: dict[str, str] = {}  # peft's names may not contain a dot, as a path does
        self._on = ""

    def load(self, name: str, token: str | bool | None, dtype: torch.dtype, device: torch.device) -> None:
        """Load what of an adapter belongs to these blocks; `name` is a local folder or an id on the Hugging Face hub.

        An adapter that changes other blocks only is served, too: these compute with it as they do without.
        Raises UserError if there is no such adapter, or none that can be served in blocks.
        """
        config_file, weights_file = (_locate(name, file, token) for file in (_CONFIG, _WEIGHTS))
        config = _read_config(name, config_file)
        key = f"adapter{len(self._keys)}"
        tensors = self._read(name, weights_file)
        if not tensors and not self._has_targets(config):
            self._keys[name] = key
            logger.info("The adapter %s changes none of these blocks", name)
            return
        try:
            inject_adapter_in_model(config, self._root, key, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(self._root, tensors, key, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, KeyError) as e:
            raise UserError(
                f"The adapter {name} does not fit this model: {str(e).strip().splitlines()[0]} "
                "Choose an adapter that was made for exactly this model."
            ) from e
        lacking = [parameter for parameter in result.missing_keys if f".{key}." in parameter]
        if lacking or result.unexpected_keys:
            strange = (lacking or result.unexpected_keys)[0]
            raise UserError(
                f"The adapter {name} does not fit this model: {strange} is {'missing' if lacking else 'unknown'}. "
                "Choose an adapter that was made for exactly this model."
            )
        for layer in self._lora_layers():
            layer.to(device)
            for parameter_name, parameter in layer.named_parameters():
                if f"{key}." in parameter_name:
                    parameter.data = parameter.data.to(dtype)
        self._keys[name] = key
        self._on = key
        self.switch_to("")
        logger.info("Loaded the adapter %s", name)

    def switch_to(self, name: str) -> None:
        """Let the blocks compute with this adapter from now on; "" is none. Raises KeyError for one that was not loaded."""
        if name and name not in self._keys:
            raise KeyError(f"This node has no adapter {name!r}")
        key = self._keys.get(name, "")
        if key == self._on:
            return
        for layer in self._lora_layers():
            layer.enable_adapters(bool(key))
            if key:
                layer.set_adapter(key)
        self._root.requires_grad_(False)  # peft would train what it switches on
        self._on = key

    def _lora_layers(self) -> list[Any]:
        return [module for module in self._root.modules() if isinstance(module, LoraLayer)]

    def _has_targets(self, config: LoraConfig) -> bool:
        """Whether the adapter's configuration names a module of these blocks."""
        return any(check_target_module_exists(config, path) for path, _ in self._root.named_modules())

    def _read(self, name: str, file: Path) -> dict[str, torch.Tensor]:
        """The tensors for these blocks, under the names that they have below the root."""
        try:
            with safe_open(file, framework="pt", backend="pread") as stored:
                names = {key: key.removeprefix(_WRAPPED) for key in stored.keys()}
                outside = [target for target in names.values() if not target.startswith(self._prefix)]
                if outside:
                    raise UserError(
                        f"The adapter {name} changes more than the model's blocks ({outside[0]}), which a swarm cannot serve. "
                        "Choose an adapter of the attention and MLP layers alone."
                    )
                numbers = {target.removeprefix(self._prefix).partition(".")[0] for target in names.values()}
                strange = sorted(numbers - {str(number) for number in range(self._num_blocks)})
                if strange or not names:
                    what = (
                        f"it changes the block {strange[0]} of {self._num_blocks}" if strange else "it has no weights"
                    )
                    raise UserError(
                        f"The adapter {name} does not fit this model: {what}. "
                        "Choose an adapter that was made for exactly this model."
                    )
                wanted = tuple(f"{self._prefix}{number}." for number in self._numbers)
                return {target: stored.get_tensor(key) for key, target in names.items() if target.startswith(wanted)}
        except SafetensorError as e:
            raise UserError(f"{file} is damaged or was not downloaded to its end. Download the adapter again.") from e


def _locate(name: str, file: str, token: str | bool | None) -> Path:
    folder = Path(name).expanduser()
    try:
        if not folder.is_dir():
            return HubModel(name, None, token, None).file(file)
        if not (folder / file).is_file():
            raise FileNotFoundError(file)
        return folder / file
    except FileNotFoundError as e:
        raise UserError(
            f"{name} is no LoRA adapter that can be served: it has no {file}. Give a folder or a name on the hub that has both "
            f"{_CONFIG} and {_WEIGHTS}."
        ) from e


def _read_config(name: str, file: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(file.parent))
    except (ValueError, TypeError, KeyError, OSError) as e:
        raise UserError(f"{file} is damaged: {str(e).splitlines()[0]} Download the adapter again.") from e
    if not isinstance(config, LoraConfig):
        raise UserError(f"The adapter {name} is of the kind {config.peft_type}. Only LoRA adapters can be served.")
    unsupported = {"modules_to_save": config.modules_to_save, "bias": config.bias != "none"}
    for setting, used in unsupported.items():
        if used:
            raise UserError(
                f"The adapter {name} was trained with {setting}, so it holds whole weights, which a swarm cannot switch on for "
                "one request. Choose an adapter without."
            )
    config.inference_mode = True
    return config


def _tree(prefix: str, children: dict[str, nn.Module]) -> nn.Module:
    """Modules such that the children are found below the root under the names that they have in the model."""
    root: Any = nn.Module()
    place = root
    for part in prefix.rstrip(".").split("."):
        place.add_module(part, nn.Module())
        place = getattr(place, part)
    for name, child in children.items():
        place.add_module(name, child)
    return root
