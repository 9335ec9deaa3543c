"""Log probabilities in step with the text: which tokens a piece of an answer consists of, and what their bytes are.

Knows tokenizers. Does not know how a token was chosen, nor what holds text back.
"""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

from petals_win.client.choosing import WeighedToken
from petals_win.engines.base import ChosenToken, TokenProbability

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class ToldTokens:
    """Those of one answer's tokens whose text is still held back."""

    def __init__(self, token_bytes: TokenBytes):
        self._token_bytes = token_bytes
        self._held: deque[tuple[int, ChosenToken]] = deque()  # with where its text begins, in characters
        self._length = self._shown = 0  # of the text so far, and of what of it was shown

    def came(self, token: int, length: int) -> None:
        """Take the next token, with which the text has `length` characters; one that is not weighed is not told."""
        if isinstance(token, WeighedToken) and token not in self._token_bytes.without_text:
            self._held.append((self._length, self._chosen(token)))
        self._length = length

    def shown(self, piece: str) -> tuple[ChosenToken, ...]:
        """The tokens of the next piece that is shown: those whose text begins in it."""
        self._shown += len(piece)
        told = []
        while self._held and self._held[0][0] < self._shown:
            told.append(self._held.popleft()[1])
        return tuple(told)

    def _chosen(self, token: WeighedToken) -> ChosenToken:
        likeliest = (TokenProbability(each, self._token_bytes(each), logprob) for each, logprob in token.likeliest)
        return ChosenToken(int(token), self._token_bytes(token), token.logprob, tuple(likeliest))


class TokenBytes:
    """What each token of a tokenizer adds to a text, in bytes: a character may consist of several tokens."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._added = {token: str(each.content) for token, each in added.items()}
        self.without_text = frozenset(token for token, each in added.items() if each.special)
        self._kinds = _kinds(self._backend.decoder)
        self._bytes_of_letters = _bytes_of_letters() if "ByteLevel" in self._kinds else {}

    def __call__(self, token: int) -> bytes:
        """Its bytes, also of one that has no text in an answer, such as the end of a turn; none of one that has no name."""
        if (content := self._added.get(token)) is not None:
            return content.encode()
        name: str = self._backend.id_to_token(token) or ""
        if self._bytes_of_letters and all(letter in self._bytes_of_letters for letter in name):
            return bytes(self._bytes_of_letters[letter] for letter in name)
        if "ByteFallback" in self._kinds and (byte := _BYTE.fullmatch(name)):
            return bytes.fromhex(byte[1])
        if not name or not self._kinds:
            return name.encode()
        # Behind another one, since some decoders leave out the blank that a text begins with.
        return self._backend.decoder.decode(["a", name]).removeprefix("a").encode()


def _kinds(decoder: Any) -> frozenset[str]:
    """The names of all decoders that one of the library "tokenizers" consists of; none if there is none."""
    if decoder is None:
        return frozenset()

    def names(state: dict[str, Any]) -> list[str]:
        return [state["type"], *(name for part in state.get("decoders", ()) for name in names(part))]

    return frozenset(names(json.loads(decoder.__getstate__())))


def _bytes_of_letters() -> dict[str, int]:
    """How byte-level tokenizers write bytes: those of visible Latin-1 characters as these, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
