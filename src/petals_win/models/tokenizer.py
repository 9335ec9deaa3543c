"""A model's tokenizer, in whatever form its folder has it: tokenizer.json, a sentencepiece model, or ranks of tiktoken.

Knows transformers' tokenizers, and whether what they make of the other forms counts as those do. Does not know models.
"""

from __future__ import annotations

import json
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
    pieces: SentencePieceProcessor | None = None
    described: dict[str, Any] = {}
    try:
        found = None if small_file(place, "tokenizer.json", hub_arguments) else _model_file(place, hub_arguments)
        beginning: dict[str, bool] = {}
        if found is not None:
            described = _described(place, hub_arguments)
            if are_ranks(found):
                _check_ranks(name, model_type if found.suffix == ".model" else "", described)
            else:
                pieces = _pieces(found)
            # Where nothing is said, a text begins so; these files cannot say it.
            if "add_bos_token" not in described and (pieces is None or pieces.bos_id() >= 0):
                beginning = {"add_bos_token": True}
        tokenizer = AutoTokenizer.from_pretrained(place, **beginning, **hub_arguments)
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
    if pieces is not None:
        _check_counts(name, tokenizer, pieces)
        if "bos_token" not in described and tokenizer("")["input_ids"] not in ([], [pieces.bos_id()]):
            raise UserError(
                f"{name} has its tokenizer as a sentencepiece model only, whose texts begin otherwise than those of its class in "
                f"transformers. {_TAKE_JSON}"
            )
    return tokenizer


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
        return SentencePieceProcessor(
            model_proto=file.read_bytes()
        )  # by its bytes: it cannot open every path of Windows
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


def _check_counts(name: str, tokenizer: Any, pieces: SentencePieceProcessor) -> None:
    """Whether ours counts as sentencepiece does by the same file: not all that such a file may say reaches transformers."""
    for text in _SAMPLES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.encode(text):
            raise UserError(
                f"{name} has its tokenizer as a sentencepiece model only, by which transformers would count tokens otherwise than the model "
                f"learned them: {text!r} becomes others. {_TAKE_JSON}"
            )
