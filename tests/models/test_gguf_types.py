"""Every type in which a GGUF file can store numbers: read as the gguf package reads it, or refused by its name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize
from gguf.quants import _type_traits
from loading_memory import taken_by_loading
from transformers import LlamaConfig

from models.gguf_writer import add_key, hyperparameters, vocabulary, write_gguf
from petals_win.errors import UserError
from petals_win.models import gguf_file
from petals_win.models.source import open_model
from petals_win.span.span import Span

WIDTH, INNER = 256, 512  # blocks of any type fit into rows
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
READ = [kind for kind in GGMLQuantizationType if kind in PLAIN or kind in _type_traits]
NAME, PARAMETER = "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


def stored(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random bytes [rows, …] of this type whose numbers are of moderate size."""
    values, size = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(int(kind))
    found = np.empty((rows * columns // values, size), dtype=np.uint8)
    wrong = np.ones(len(found), dtype=bool)
    for _ in range(1000):
        found[wrong] = draw.integers(0, 256, (int(wrong.sum()), size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            numbers = dequantize(found, kind).reshape(len(found), values) if kind in READ else np.zeros((1, 1))
            wrong = ~(np.abs(numbers) < 100).all(axis=1)
        if not wrong.any():
            return found.reshape(rows, -1)
    raise AssertionError(f"no bytes of {kind.name} make numbers of moderate size")


@pytest.fixture
def with_type(checkpoint, tmp_path):
    """Makes a file of a small Llama one of whose weights is of a type; gives the path and the stored bytes."""

    def make(kind: GGMLQuantizationType) -> tuple[Path, np.ndarray]:
        model = open_model(str(checkpoint("llama", hidden_size=WIDTH, intermediate_size=INNER))).whole_model()
        data = stored(kind, INNER, WIDTH)
        path = tmp_path / f"of-{kind.name}.gguf"
        return write_gguf(model, path, tensors={NAME: data}, raw={NAME: kind}), data

    return make


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.name)
def test_it_is_read_as_the_gguf_package_reads_it(with_type, kind):
    path, data = with_type(kind)
    wanted = torch.from_numpy(dequantize(data, kind).reshape(INNER, WIDTH))
    source = open_model(str(path))
    assert torch.equal(source.whole_model(torch.float32).get_parameter(PARAMETER), wanted)
    assert torch.equal(source.whole_model(torch.bfloat16).get_parameter(PARAMETER), wanted.bfloat16())


@pytest.mark.parametrize(
    "kind", [kind for kind in GGMLQuantizationType if kind not in READ], ids=lambda kind: kind.name
)
def test_others_are_refused_by_name(with_type, kind):
    path, _ = with_type(kind)
    with pytest.raises(UserError, match=f"has the tensor {re.escape(NAME)} in the type {kind.name}, .*such as Q4_K_M"):
        open_model(str(path))


def test_a_type_of_tomorrow(with_type):
    path, _ = with_type(GGMLQuantizationType.Q8_0)
    data = path.read_bytes()
    name = NAME.encode()
    where = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two of them
    assert data[where] == GGMLQuantizationType.Q8_0
    path.write_bytes(data[:where] + bytes([99]) + data[where + 1 :])
    with pytest.raises(UserError, match="has tensors of the type number 99"):
        open_model(str(path))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2_moe", "mixtral", "gpt_oss", "granite", "falcon-new", "gpt2", "bloom", "phi3"]
)
def test_large_tensors_never_pass_through_32_bits(checkpoint, tmp_path, monkeypatch, family):
    """What is done with them moves 16 bits about, so it is equal to what is done with 32 and then rounded."""
    path = write_gguf(open_model(str(checkpoint(family))).whole_model(), tmp_path / f"{family}.gguf")
    wanted = open_model(str(path)).whole_model(torch.bfloat16).state_dict()
    monkeypatch.setattr(gguf_file, "_LARGE", 1)
    monkeypatch.setattr(gguf_file, "_PIECE", 1024)
    found = open_model(str(path)).whole_model(torch.bfloat16).state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_quantized_file_is_computed_in_16_bits_but_for_a_small_one(with_type, monkeypatch):
    quantized, half = (
        open_model(str(with_type(kind)[0])) for kind in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.F16)
    )
    assert quantized.dtype is torch.float32 and quantized.is_quantized_gguf
    assert half.dtype is torch.float32 and not half.is_quantized_gguf
    monkeypatch.setattr(gguf_file, "_SMALL", 1000)
    assert quantized.dtype is torch.bfloat16 and half.dtype is torch.float32
    assert Span.load(quantized, 1, 2).dtype is torch.bfloat16


BLOCKS, HIDDEN, INNER_OF_LARGE, GROUPED, WORDS = 8, 2048, 5632, 512, 8_000


def write_large(path: Path) -> None:
    """A Llama of 350 million parameters in Q4_0: 200 MB, that take 1.4 GB in 32 bits."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
    block = np.random.default_rng(0).integers(0, 256, (2048, size), dtype=np.uint8)
    block[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)

    def quantized(rows: int, columns: int) -> np.ndarray:
        return np.resize(block, (rows, columns // values * size))

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER_OF_LARGE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    writer = GGUFWriter(path, "llama")
    for key, value in {**hyperparameters(config), **vocabulary(WORDS)}.items():
        add_key(writer, key, value)
    shapes = {
        f"attn_{name}": (HIDDEN if name in "q output" else GROUPED, HIDDEN) for name in ("q", "k", "v", "output")
    }
    shapes |= {name: (INNER_OF_LARGE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
    shapes |= {"ffn_down": (HIDDEN, INNER_OF_LARGE)}
    everything = {"token_embd": (WORDS, HIDDEN), "output": (WORDS, HIDDEN)}
    everything |= {f"blk.{index}.{name}": shape for index in range(BLOCKS) for name, shape in shapes.items()}
    for name, shape in everything.items():
        writer.add_tensor(f"{name}.weight", quantized(*shape), raw_dtype=GGMLQuantizationType.Q4_0)
    for name in ("output_norm", *(f"blk.{index}.{norm}_norm" for index in range(BLOCKS) for norm in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_memory_while_loading(tmp_path):
    """Little more than what stays: one tensor at a time is read, and laid out before the next one, and none of them in 32 bits."""
    path = tmp_path / "large.gguf"
    write_large(path)
    assert path.stat().st_size > 180e6
    taken = taken_by_loading(path)
    assert taken.dtype == "bfloat16" and taken.planned == taken.weights > 500e6
    assert 0.95 <= taken.kept / taken.planned <= 1.05, taken
    assert taken.most <= 1.25 * taken.planned, taken
