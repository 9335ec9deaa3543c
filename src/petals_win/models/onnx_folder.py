"""A model that was converted for ONNX Runtime: a folder with genai_config.json, the graph, and the tokenizer's files.

Knows that file and what of it is to be trusted. Does not know how a graph is computed, and imports nothing of ONNX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from petals_win.errors import UserError
from petals_win.models.loading import one_answer_at_a_time
from petals_win.models.tokenizer import load_tokenizer

CONFIG = "genai_config.json"
MARKER = "petals_win_conversion.json"  # in what `petals-win convert` made: {"name": the model's}

_LARGEST = 2**24  # of any number below
_LARGEST_CONFIG = 2**22  # bytes
# Names of genai_config.json's that would load somebody's program code into this process.
_CODE = ("custom_ops_library", "library_path", "ep_library_path")
_DEVICES = {"cuda": "cuda", "dml": "dml", "webgpu": "webgpu"}  # by provider's name in lower case


@dataclass(frozen=True)
class OnnxFolder:
    """What genai_config.json and the files beside it say. device: "cpu", "cuda", "dml" or "webgpu".

    cache_numbers: how many numbers a token leaves in the caches of all layers together.
    plain: whether the whole is one graph with one cache for each layer, in which nothing is dropped.
    """

    path: Path
    name: str
    graph: Path
    device: str
    vocabulary: int
    context_length: int
    num_layers: int
    cache_numbers: int
    plain: bool
    generation: GenerationConfig

    @property
    def graph_bytes(self) -> int:
        """Of the graph and the files of its weights, which are named after it."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.name.startswith(self.graph.name))

    def tokenizer(self) -> Any:
        """Raises UserError if its files are missing or damaged."""
        return load_tokenizer(self.name, str(self.path))


def is_onnx_folder(name_or_path: str) -> bool:
    """Whether that is a folder for ONNX Runtime."""
    return (Path(name_or_path).expanduser() / CONFIG).is_file()


def open_onnx_folder(path: Path) -> OnnxFolder:
    """Read all but the graph and the tokenizer. Raises UserError for what is damaged, or not to be trusted."""
    described = _json(path / CONFIG)
    _refuse_code(path, described)
    try:
        model = described["model"]
        decoder = model["decoder"]
        layers, heads, size = (
            _number(decoder, each) for each in ("num_hidden_layers", "num_key_value_heads", "head_size")
        )
        vocabulary, context = _number(model, "vocab_size"), _number(model, "context_length")
        providers = [name for option in decoder["session_options"].get("provider_options", ()) for name in option]
        device = _device(path, providers)
        parts = "filename" not in decoder or "pipeline" in decoder
        graph = None if parts else decoder["filename"]
        if not parts and (not isinstance(graph, str) or Path(graph).name != graph):
            raise ValueError(f"filename {graph!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path / CONFIG} is damaged: {_said(e)}. {_ANEW}") from e
    if graph is None:
        raise UserError(
            f"{path} is a model of several graphs, which petals-win does not compute. Convert the model's safetensors files with "
            "'petals-win convert'."
        )
    if not (path / graph).is_file():
        raise UserError(f"{path} lacks the file {graph}. {_ANEW}")
    return OnnxFolder(
        path=path,
        name=_name(path),
        graph=path / graph,
        device=device,
        vocabulary=vocabulary,
        context_length=context,
        num_layers=layers,
        cache_numbers=2 * layers * heads * size,
        plain="sliding_window" not in decoder and "encoder" not in model and "vision" not in model,
        generation=_generation(path, model, described.get("search", {})),
    )


_ANEW = "Convert the model again with 'petals-win convert'."


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ValueError("it is too large")
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is damaged: {_said(e)}. {_ANEW}") from e
    return found


def _refuse_code(path: Path, value: Any) -> None:
    """Raises UserError if something is named that ONNX Runtime would load and run."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key in _CODE:
                raise UserError(
                    f"{path / CONFIG} names program code to be loaded ({key}), which could do anything on this PC, so petals-win does "
                    "not open it. Convert the model yourself with 'petals-win convert'."
                )
            _refuse_code(path, part)
    elif isinstance(value, list):
        for part in value:
            _refuse_code(path, part)


def _number(described: dict[str, Any], name: str) -> int:
    number = described[name]
    if not isinstance(number, int) or not 0 < number <= _LARGEST:
        raise ValueError(f"{name} is {str(number)[:40]}")
    return number


def _device(path: Path, providers: list[str]) -> str:
    if not providers:
        return "cpu"
    device = _DEVICES.get(providers[0].lower())
    if device is None:
        raise UserError(
            f"{path} was made for {providers[0][:40]}, which petals-win does not use. Convert the model with 'petals-win convert', for "
            f"one of: cpu, {', '.join(_DEVICES.values())}."
        )
    return device


def _name(path: Path) -> str:
    """As it was called when it was converted, or as its folder is."""
    if (path / MARKER).is_file():
        name = _json(path / MARKER).get("name")
        if isinstance(name, str) and name:
            return name
    return path.resolve().name


def _generation(path: Path, model: dict[str, Any], search: dict[str, Any]) -> GenerationConfig:
    """How its makers want it to generate; genai_config.json says less, and has an end where the model has none."""
    if (path / "generation_config.json").is_file():
        try:
            config = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{path / 'generation_config.json'} is damaged. {_ANEW}") from e
    else:
        wanted = {
            name: search.get(name) for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        }
        ends = {name: model.get(name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
        config = GenerationConfig(**{name: value for name, value in {**wanted, **ends}.items() if value is not None})
    one_answer_at_a_time(path.name, config)
    return config


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)[:200].rstrip(". ")
