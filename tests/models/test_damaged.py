"""Damaged files: whatever is wrong with them, a sentence says it, or the model computes; no other error and no endless reading.

The damages are drawn by a seed, so that a failure names a file that can be made again.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gguf_writer import write_gguf
from petals_win.errors import UserError
from petals_win.models.checkpoint import INDEX
from petals_win.models.source import open_model
from petals_win.span.span import Span

ODD: list[Any] = [None, 0, -1, 2**31, 2**70, 1.5, "x", "", [], {}, True, [1, 2], {"a": 1}, float("nan")]


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


def flipped(data: bytes, end: int, draw: random.Random) -> bytes:
    """A few bytes before `end` changed, or all from somewhere on gone."""
    if draw.random() < 0.2:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(end)] = draw.choice((0, 1, 255, draw.randrange(256)))
    return bytes(changed)


def odd_json(data: bytes, draw: random.Random) -> bytes:
    """An entry gone, or with a value that nobody expects."""
    whole = json.loads(data)
    place = whole
    while True:
        key = draw.choice(sorted(place))
        if isinstance(place[key], dict) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        if draw.random() < 0.3:
            del place[key]
        else:
            place[key] = draw.choice(ODD)
        return json.dumps(whole).encode()


def outcome(path: Path) -> str:
    """Raises whatever is no sentence for the user."""
    try:
        source = open_model(str(path))
        Span.load(source, 1, 2).forward(torch.ones(1, 2, source.hidden_size), 1, 2)
    except UserError as e:
        assert len(str(e)) > 20
        return "refused"
    return "computes"


@pytest.mark.parametrize("seed", range(40))
def test_a_gguf_file(seed, checkpoint, tmp_path):
    whole = write_gguf(open_model(str(checkpoint("llama"))).whole_model(), tmp_path / "whole.gguf")
    data = whole.read_bytes()
    changed = flipped(data, data.index(b"tokenizer.ggml.tokens") if seed % 2 else 20_000, random.Random(seed))
    (tmp_path / "damaged.gguf").write_bytes(changed)
    outcome(tmp_path / "damaged.gguf")


def header(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("what", ["config.json", INDEX, "safetensors"])
@pytest.mark.parametrize("seed", range(20))
def test_safetensors(what, seed, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("llama", shard_size=30_000), tmp_path / "llama"))
    draw = random.Random(seed)
    file = folder / what if what.endswith(".json") else draw.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    if what.endswith(".json") and seed % 4:
        file.write_bytes(odd_json(data, draw))
    else:
        file.write_bytes(flipped(data, header(data) if what == "safetensors" else len(data), draw))
    outcome(folder)
