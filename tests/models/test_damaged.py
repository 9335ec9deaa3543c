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
from tiny_chat import TEMPLATE, tiny_chat_model

from models.gguf_writer import write_gguf
from petals_win.client.hollow import hollow_model
from petals_win.engines.base import GenerationRequest
from petals_win.engines.constraints import Constraints
from petals_win.engines.prompts import PromptEncoder
from petals_win.engines.tokens import Language
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
        key = draw.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        if draw.random() < 0.3:
            del place[key]
        else:
            place[key] = draw.choice(ODD)
        return json.dumps(whole).encode()


def outcome(path: Path) -> torch.Tensor | None:
    """What the model computes; None if it is refused. Raises whatever is no sentence for the user."""
    try:
        source = open_model(str(path))
        found = Span.load(source, 1, 2).forward(torch.ones(1, 2, source.hidden_size), 1, 2)
    except UserError as e:
        check_sentence(e)
        return None
    assert torch.isfinite(found).all()
    return found


def check_sentence(error: UserError) -> None:
    said = str(error)
    assert len(said) > 20 and "Traceback" not in said and said.count("\n") == 0, said


@pytest.mark.parametrize("seed", range(40))
def test_a_gguf_file(seed, checkpoint, tmp_path):
    whole = write_gguf(open_model(str(checkpoint("llama"))).whole_model(), tmp_path / "whole.gguf")
    data = whole.read_bytes()
    changed = flipped(data, data.index(b"tokenizer.ggml.tokens") if seed % 2 else 20_000, random.Random(seed))
    (tmp_path / "damaged.gguf").write_bytes(changed)
    if outcome(tmp_path / "damaged.gguf") is not None:
        starts(tmp_path / "damaged.gguf")


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
    found = outcome(folder)
    if found is not None and what != "config.json":
        whole = outcome(checkpoint("llama"))
        assert whole is not None and torch.equal(found, whole), "it computes, but otherwise"


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """A model with all files of a tokenizer and of its settings."""
    folder = tiny_chat_model(tmp_path_factory.mktemp("chats") / "chats", context=256)
    settings = {"do_sample": True, "eos_token_id": [2, 10], "suppress_tokens": [7], "repetition_penalty": 1.1}
    settings |= {"temperature": 0.7, "top_p": 0.9, "cache_implementation": "static", "bad_words_ids": [[9, 8]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def starts(folder: Path) -> str:
    """What an API does with a model before and when it answers, its blocks aside. Raises whatever is no sentence for the user."""
    try:
        source = open_model(str(folder))
        language = Language.of(source.tokenizer(), hollow_model(source, torch.nn.Identity()))
        prompts = PromptEncoder(source.name, language.tokenizer, language.vocabulary)
        Constraints(language)
    except UserError as e:
        check_sentence(e)
        return "refused"
    turns: tuple[dict[str, Any], ...] = (
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Hi, you"},
    )
    for asked in ({"messages": turns}, {"prompt": "Hi, you"}):
        try:
            prompt = prompts.encode(GenerationRequest(model="chats", **asked))
        except UserError as e:
            check_sentence(e)
            continue
        assert all(0 <= token < language.vocabulary for token in prompt.tokens)
        assert isinstance(language.tokenizer.decode(prompt.tokens), str)
    return "answers"


def test_a_model_that_is_whole_answers(chats):
    assert starts(chats) == "answers"


TEXTS = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("seed", range(25))
def test_tokenizers_and_settings(what, seed, chats, tmp_path):
    folder = Path(shutil.copytree(chats, tmp_path / "chats"))
    draw, file = random.Random(seed), folder / what
    data = file.read_bytes()
    odd = what.endswith(".json") and seed % 5
    file.write_bytes(odd_json(data, draw) if odd else flipped(data, len(data), draw))
    starts(folder)


@pytest.mark.parametrize("what", [*TEXTS, "model.safetensors", "config.json"])
@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"{}", b"[]", b"null", b"\xff\xfe{", b"[" * 100_000], ids=range(7))
def test_files_of_something_else(what, data, chats, tmp_path):
    folder = Path(shutil.copytree(chats, tmp_path / "chats"))
    (folder / what).write_bytes(data)
    starts(folder)
