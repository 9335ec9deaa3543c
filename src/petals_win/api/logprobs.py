"""Log probabilities as OpenAI's replies have them: in chats, and in the older form of plain completions.

Knows these two forms. Does not know which tokens belong to which piece of an answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from petals_win.engines.base import ChosenToken, TokenProbability

# JSON has no infinity; it is what OpenAI says of tokens that cannot come.
_LEAST = -9999.0


def of_chat(tokens: Iterable[ChosenToken]) -> dict[str, Any]:
    """`logprobs` of a message, or of a piece of one."""
    content = [{**_entry(token), "top_logprobs": [_entry(each) for each in token.likeliest]} for token in tokens]
    return {"content": content, "refusal": None}


def _entry(token: TokenProbability) -> dict[str, Any]:
    return {"token": _name(token.text), "bytes": list(token.text), "logprob": _finite(token.logprob)}


class TextLogprobs:
    """`logprobs` of one text, from its beginning on, in pieces."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters before the next token

    def piece(self, tokens: Iterable[ChosenToken]) -> dict[str, Any]:
        """The next tokens; their offsets go on where those of the last piece ended."""
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            told["tokens"].append(_name(token.text, "bytes:"))
            told["token_logprobs"].append(_finite(token.logprob))
            # What was chosen is there in any case.
            told["top_logprobs"].append(
                {_name(each.text, "bytes:"): _finite(each.logprob) for each in (*token.likeliest, token)}
            )
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(token.text))
        return told


def _name(data: bytes, prefix: str = "") -> str:
    """The text of a token, or its bytes as escapes where they are no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
