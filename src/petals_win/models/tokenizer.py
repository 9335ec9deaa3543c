"""A model's tokenizer, in whatever form its folder has it: tokenizer.json, a sentencepiece model, or ranks of tiktoken.

Knows transformers' tokenizers, and whether what they make of the other forms counts as those do. Does not know models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from petals_win.errors import UserError
from petals_win.models.transformers_internals import are_ranks, small_file

_HELLO = "Hello, world! 1"
# What tells one way of cutting texts up from another: words, digits, lines, other scripts, what has no token of its own.
_SAMPLES = (_HELLO, "In 2024 it was 3.5 km\nand a line", "Käse, кот, 東京", "x = [1, 2]; 🙂")
_TAKE_JSON = "Take a version of the model that has the file tokenizer.json."
_AGAIN = "Download the model again, with all of its files."


def load_tokenizer(name: str, place: str, model_type: str = "", **hub_arguments: Any) -> Any:
    """The tokenizer of the model `name`, which from_pretrained() finds at `place`; `model_type` is transformers' word, "" if unknown.

    Raises UserError if there is none that can be read, or if what can be made of it would count otherwise than the model learned.
    """
    try:
        other = (
            None
            if small_file(place, "tokenizer.json", hub_arguments)
            else _Other.at(name, place, model_type, hub_arguments)
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **(other.options if other else {}), **hub_arguments)
        words = tokenizer.get_vocab().keys()
        if words:
            tokenizer.decode(tokenizer(_HELLO)["input_ids"])  # some damage shows only when it is used
    except UserError:
        raise
    except Exception as e:  # transformers and tokenizers check these files in many places, by errors of all kinds
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"The tokenizer of {name} cannot be loaded: {reason.rstrip('.')}. {_AGAIN}") from e
    if words <= set(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise UserError(
            f"The tokenizer of {name} has no words: its files, such as tokenizer.json, are missing. {_AGAIN}"
        )
    if other is not None:
        other.check(name, tokenizer)
    return tokenizer


@dataclass(frozen=True)
class _Other:
    """A file that stands for tokenizer.json: of sentencepiece, with its own reader, or of tiktoken."""

    pieces: SentencePieceProcessor | None
    described: dict[str, Any]  # in tokenizer_config.json

    @classmethod
    def at(cls, name: str, place: str, model_type: str, hub_arguments: dict[str, Any]) -> _Other | None:
        """None if there is none. Raises UserError for one by which nobody can count."""
        file = _model_file(place, hub_arguments)
        if file is None:
            return None
        described = _described(place, hub_arguments)
        if not are_ranks(file):
            return cls(_pieces(file), described)
        _check_ranks(name, model_type if file.suffix == ".model" else "", described)
        return cls(None, described)

    @property
    def options(self) -> dict[str, bool]:
        """Where nothing is said, a text begins with a token of its own; these files cannot say it."""
        begins = "add_bos_token" not in self.described and (self.pieces is None or self.pieces.bos_id() >= 0)
        return {"add_bos_token": True} if begins else {}

    def check(self, name: str, tokenizer: Any) -> None:
        """Whether `tokenizer` counts as sentencepiece does by the same file: not all that it may say reaches transformers."""
        if self.pieces is None:
            return
        for text in _SAMPLES:
            if tokenizer(text, add_special_tokens=False)["input_ids"] != self.pieces.encode(text):
                raise _otherwise(name, f"{text!r} becomes others")
        known = "bos_token" not in self.described and bool(self.options)
        if known and tokenizer("")["input_ids"][:1] != [self.pieces.bos_id()]:
            raise _otherwise(name, "another one begins a text")


def _otherwise(name: str, how: str) -> UserError:
    return UserError(
        f"{name} has its tokenizer as a sentencepiece model only, by which transformers would count tokens otherwise than the model "
        f"learned them: {how}. {_TAKE_JSON}"
    )


def _model_file(place: str, hub_arguments: dict[str, Any]) -> Path | None:
    """Of sentencepiece or of tiktoken; both go by the same name."""
    names = ["tokenizer.model", "tiktoken.model", *(path.name for path in sorted(Path(place).glob("*.tiktoken")))]
    return next((found for name in names if (found := small_file(place, name, hub_arguments))), None)


def _described(place: str, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing if there is none."""
    file = small_file(place, "tokenizer_config.json", hub_arguments)
    return {} if file is None else dict(json.loads(file.read_text("utf-8")))


def _pieces(file: Path) -> SentencePieceProcessor:
    try:
        # By its bytes, since it cannot open every path of Windows.
        return SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError as e:
        raise UserError(f"{file} is damaged: sentencepiece cannot read it. {_AGAIN}") from e


def _check_ranks(name: str, model_type: str, described: dict[str, Any]) -> None:
    """Such a file says which bytes are a token, but not how words are told apart, nor what control tokens there are."""
    if model_type != "llama":
        raise UserError(
            f"{name} has its tokenizer as ranks of tiktoken only, which do not say how words are told apart; of Llama 3 alone that is "
            f"known. {_TAKE_JSON}"
        )
    if not described.get("added_tokens_decoder"):
        raise UserError(
            f"{name} has its tokenizer as ranks of tiktoken only, and no tokenizer_config.json that names its control tokens "
            f"(added_tokens_decoder). {_TAKE_JSON}"
        )
