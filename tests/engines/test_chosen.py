"""The bytes of tokens, for each kind of tokenizer, and tokens that wait for their text to be shown."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from petals_win.client.choosing import WeighedToken
from petals_win.engines.chosen import TokenBytes, ToldTokens

TEXT = "Grüße, 你好 🎉!  Two blanks,\ta tab.\n"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["Two blanks and two more"], trainers.BpeTrainer(initial_alphabet=alphabet))
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As those that were made with sentencepiece."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁", "▁Two", "▁bl", "anks", "G", "r", "ü", "你", "."):
        vocabulary[piece] = len(vocabulary)
    scores = [(piece, -float(number)) for piece, number in vocabulary.items()]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def loaded(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<ends ü>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool ü>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_all_tokens_are_those_of_the_text(make):
    tokenizer = loaded(make())
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    token_bytes = TokenBytes(tokenizer)
    assert b"".join(map(token_bytes, ids)).decode().removeprefix(" ") == TEXT
    assert any(token_bytes(token).decode(errors="ignore") == "" for token in ids), "no character has several tokens"
    special, tool = (tokenizer.convert_tokens_to_ids(name) for name in ("<ends ü>", "<tool ü>"))
    assert (token_bytes(special).decode(), token_bytes(tool).decode()) == ("<ends ü>", "<tool ü>")
    assert special in token_bytes.without_text and tool not in token_bytes.without_text
    assert token_bytes(10**6) == b""


def test_the_bytes_of_other_kinds():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    token_bytes = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words))
    assert (token_bytes(1), token_bytes(2)) == (b" play", b"ing")
    without = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=without))(1) == b"b"


def weighed(token: int) -> WeighedToken:
    return WeighedToken(token, -0.5, ((token, -0.5), (0, -1.0)))


def test_tokens_wait_for_their_text():
    tokenizer = loaded(byte_level())
    ends = tokenizer.convert_tokens_to_ids("<ends ü>")
    told = ToldTokens(TokenBytes(tokenizer))
    ids = [token for byte in ("a", "b", "🎉", "c") for token in tokenizer(byte, add_special_tokens=False)["input_ids"]]
    assert len(ids) == 7
    length = 0
    for token, text in zip([*ids[:2], ends, *ids[2:]], ["a", "b", "", "", "", "", "🎉", "c"], strict=True):
        length += len(text)
        told.came(weighed(token), length)
    assert [each.token for each in told.shown("a")] == ids[:1]
    assert [each.token for each in told.shown("b🎉")] == ids[1:6]
    [last] = told.shown("c")
    assert (last.token, last.text, last.logprob, last.likeliest[0].text) == (ids[6], b"c", -0.5, b"c")
    assert type(last.token) is int
    assert told.shown("") == ()


def test_plain_tokens_are_not_told():
    told = ToldTokens(TokenBytes(loaded(byte_level())))
    told.came(5, 3)
    assert told.shown("abc") == ()
