"""A model in several GGUF files: the first is named, and what is missing or does not belong there is named in return."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from models.gguf_writer import write_gguf
from petals_win.errors import UserError
from petals_win.models.source import open_model


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


@pytest.fixture
def parts(checkpoint, tmp_path):
    """The model, and three parts of it as gguf-split makes them, the first one with keys alone."""
    original = open_model(str(checkpoint("llama")))
    model = original.whole_model()
    whole = write_gguf(model, tmp_path / "whole.gguf")
    tensors = GGUFReader(whole).tensors
    keys = {"split.no": 0, "split.count": 3, "split.tensors.count": len(tensors)}
    first = tmp_path / "tiny-Q4_K_M-00001-of-00003.gguf"
    write_gguf(model, first, keys, only=())
    for number in (1, 2):
        writer = GGUFWriter(tmp_path / f"tiny-Q4_K_M-0000{number + 1}-of-00003.gguf", "llama")
        for key, value in {**keys, "split.no": number}.items():
            writer.add_uint32(key, value)
        for tensor in tensors[number - 1 :: 2]:
            writer.add_tensor(tensor.name, tensor.data.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return original, first


def other(first: Path, number: int) -> Path:
    return first.with_name(first.name.replace("00001-of", f"0000{number}-of"))


def test_the_parts_are_one_model(parts):
    original, first = parts
    source = open_model(str(first))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        wanted, found = (one.whole_model()(input_ids=ids).logits for one in (original, source))
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert source.name == "tiny"
    before = source.content_id
    assert open_model(str(first)).content_id == before
    data = bytearray(other(first, 3).read_bytes())
    data[-1] ^= 1
    other(first, 3).write_bytes(data)
    assert open_model(str(first)).content_id != before


def test_missing_parts_are_named(parts):
    _, first = parts
    other(first, 2).unlink()
    with pytest.raises(UserError, match=r"lacks tiny-Q4_K_M-00002-of-00003.gguf\. Download"):
        open_model(str(first))


def test_a_later_part_names_the_first(parts):
    _, first = parts
    with pytest.raises(UserError, match=r"Name the first one: .*tiny-Q4_K_M-00001-of-00003.gguf"):
        open_model(str(other(first, 2)))


def test_a_part_twice(parts):
    _, first = parts
    other(first, 3).write_bytes(other(first, 2).read_bytes())
    with pytest.raises(UserError, match="says that it is part 2 of 3, but its name says 3 of 3"):
        open_model(str(first))


def test_a_part_of_another_model(parts):
    _, first = parts
    writer = GGUFWriter(other(first, 3), "llama")
    for key, value in {"split.no": 2, "split.count": 3, "split.tensors.count": 9}.items():
        writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="tensors where it says"):
        open_model(str(first))


def test_a_damaged_part_is_named(parts):
    _, first = parts
    other(first, 2).write_bytes(other(first, 2).read_bytes()[:-100])
    with pytest.raises(UserError, match="00002-of-00003.gguf is no complete GGUF file"):
        open_model(str(first))


def test_a_name_without_a_number(parts):
    _, first = parts
    renamed = first.rename(first.with_name("tiny.gguf"))
    with pytest.raises(UserError, match="is one of 3 parts of a model, but its name does not tell the others"):
        open_model(str(renamed))
