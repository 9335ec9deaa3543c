"""Tokenizers that are no tokenizer.json count as those who made them do, or are refused with what to do."""

from __future__ import annotations

import io
import json
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from petals_win.errors import UserError
from petals_win.models.source import open_model

PROSE = Path(__file__).resolve().parents[1] / "data" / "prose.txt"
# None begins with a blank: transformers' class for Llama swallows one, as it means to.
TEXTS = [
    "Hello, world! 1",
    "two  blanks,\ta tab\n\nand lines ",
    "Käse, кот, 東京 🙂",
    "In 2024: 3.5 km",
    "",
]


def trained(kind: str = "bpe", **settings: Any) -> bytes:
    """A model of sentencepiece with 400 pieces, as Llama's makers ask for one."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.read_text("utf-8").splitlines()),
        model_writer=written,
        model_type=kind,
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **settings,
    )
    return written.getvalue()


@pytest.fixture
def folder_of(checkpoint, tmp_path):
    """A folder of a tiny model with these files of a tokenizer and no others."""

    def make(files: dict[str, bytes], described: dict[str, Any] | None = None, family: str = "llama") -> str:
        folder = Path(shutil.copytree(checkpoint(family), tmp_path / family))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if described is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(described))
        return str(folder)

    return make


@pytest.mark.parametrize(
    "described", [{"tokenizer_class": "LlamaTokenizer"}, {}, None], ids=["named", "empty", "none"]
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_sentencepiece_model_alone(folder_of, family, described):
    model = trained()
    tokenizer = open_model(folder_of({"tokenizer.model": model}, described, family)).tokenizer()
    theirs = SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == theirs.decode(ids), text
    assert tokenizer.bos_token_id == theirs.bos_id() and tokenizer.eos_token_id == theirs.eos_id()
    assert tokenizer("Hello")["input_ids"] == [theirs.bos_id(), *theirs.encode("Hello")]


@pytest.mark.parametrize(
    ("said", "control"), [({"add_bos_token": False}, {}), ({}, {"bos_id": -1})], ids=["said", "none"]
)
def test_a_text_without_a_beginning(folder_of, said, control):
    model = trained(**control)
    tokenizer = open_model(folder_of({"tokenizer.model": model}, said, "mistral")).tokenizer()
    assert tokenizer("Hello")["input_ids"] == SentencePieceProcessor(model_proto=model).encode("Hello")


GEMMA = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False)


def test_one_of_gemma(folder_of):
    model = trained(
        **GEMMA,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )
    tokenizer = open_model(folder_of({"tokenizer.model": model}, family="gemma2")).tokenizer()
    theirs = SentencePieceProcessor(model_proto=model)
    for text in [*TEXTS, "<start_of_turn>user\nHi<end_of_turn>"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), text
    assert tokenizer("Hi")["input_ids"] == [2, *theirs.encode("Hi")]


def test_one_that_transformers_would_count_otherwise(folder_of):
    """Its class for Llama puts a blank before every text, whatever the file says."""
    files = {"tokenizer.model": trained(add_dummy_prefix=False)}
    with pytest.raises(UserError, match="llama.*'Hello, world! 1' becomes others. Take a version .* tokenizer.json"):
        open_model(folder_of(files, {"tokenizer_class": "LlamaTokenizer"})).tokenizer()


def test_one_with_other_control_tokens_than_its_class(folder_of):
    with pytest.raises(UserError, match="gemma2 .*another one begins a text. Take a version .* tokenizer.json"):
        open_model(folder_of({"tokenizer.model": trained(**GEMMA)}, family="gemma2")).tokenizer()


def test_one_that_is_damaged(folder_of):
    with pytest.raises(UserError, match="Download the model again"):
        open_model(folder_of({"tokenizer.model": trained()[:700]})).tokenizer()


def test_one_beside_a_tokenizer_json_is_not_looked_at(folder_of):
    kept = open_model(folder_of({"tokenizer.model": trained()})).tokenizer()
    files = {"tokenizer.json": kept.backend_tokenizer.to_str().encode(), "tokenizer.model": b"damaged"}
    found = open_model(folder_of(files, {}, family="mistral")).tokenizer()
    for text in TEXTS:
        assert found(text)["input_ids"] == kept(text)["input_ids"]


MERGED = [b"He", b"ll", b"Hell", b" w", b"or", b"ld", b" wor", b" world", b"12", b"123", b"34", b"45"]
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>"]


def ranks(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (b64encode(token), number) for number, token in enumerate(tokens))


TOKENS = [bytes([byte]) for byte in range(256)] + MERGED
DESCRIBED = {
    "bos_token": CONTROL[0],
    "eos_token": CONTROL[1],
    "added_tokens_decoder": {
        str(len(TOKENS) + index): {"content": token, "special": True} for index, token in enumerate(CONTROL)
    },
}


def by_ranks(words: list[bytes]) -> list[int]:
    """tiktoken's rule: of a word's neighbours those become one that are the token of the lowest number."""
    found = []
    for word in words:
        pieces = [bytes([byte]) for byte in word]
        while len(pieces) > 1:
            joined = [left + right for left, right in zip(pieces, pieces[1:], strict=False)]
            known = [token for token in joined if token in TOKENS]
            if not known:
                break
            at = joined.index(min(known, key=TOKENS.index))
            pieces[at : at + 2] = [joined[at]]
        found += [TOKENS.index(piece) for piece in pieces]
    return found


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_ranks_of_llama_3(folder_of, name):
    tokenizer = open_model(folder_of({name: ranks(TOKENS)}, DESCRIBED)).tokenizer()
    words = [b"Hello", b" world", b" ", b"123", b"45", b"!\n", b" \xc3\xa4"]
    text = b"".join(words).decode()
    ids = tokenizer(text)["input_ids"]
    assert ids == [len(TOKENS), *by_ranks(words)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == len(TOKENS) + 1


@pytest.mark.parametrize(
    "files, described, family, said",
    [
        (
            {"tokenizer.model": ranks(TOKENS)},
            DESCRIBED,
            "qwen2",
            "of Llama 3 alone that is known. Take .*tokenizer.json",
        ),
        (
            {"qwen.tiktoken": ranks(TOKENS)},
            DESCRIBED,
            "qwen2",
            "of Llama 3 alone that is known. Take .*tokenizer.json",
        ),
        ({"tokenizer.model": ranks(TOKENS)}, {}, "llama", "no tokenizer_config.json that names its control tokens"),
        ({"tokenizer.model": ranks(TOKENS[1:])}, DESCRIBED, "llama", "no token for the byte 0. Download"),
        ({"tokenizer.model": ranks([*TOKENS, b"He"])}, DESCRIBED, "llama", "line 269 .* Download"),
        ({"tokenizer.model": ranks(TOKENS) + b"SGVs 999\n"}, DESCRIBED, "llama", "leaves out numbers.* Download"),
        ({"tokenizer.model": ranks(TOKENS) + b"no rank\n"}, DESCRIBED, "llama", "line 269 .* Download"),
    ],
    ids=["another's", "under another name", "without control tokens", "without a byte", "twice", "a hole", "a line"],
)
def test_ranks_that_are_refused(folder_of, files, described, family, said):
    with pytest.raises(UserError, match=said):
        open_model(folder_of(files, described, family)).tokenizer()


def test_no_tokenizer_at_all(folder_of):
    with pytest.raises(UserError, match="tokenizer of llama has no words.*Download the model again"):
        open_model(folder_of({}, {"tokenizer_class": "LlamaTokenizer"})).tokenizer()
