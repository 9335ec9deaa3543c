"""What keeps an answer in JSON from going on for ever where its schema would let it: ever deeper lists, numbers without end.

Small models fall into such loops. No schema is broken by it: what would begin one is left out only where something else may come.
Knows the bytes of tokens and how JSON is written. Does not know schemas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from llguidance import LLTokenizer

_DEEPEST = 64  # lists and objects within each other; some programs' parsers take no more
_MOST_DIGITS = 80  # in a row; those of a number of 256 bits, and four times what a float can tell apart

_QUOTE, _BACKSLASH = b'"\\'
_OPENING, _CLOSING, _DIGITS = frozenset(b"[{"), frozenset(b"]}"), frozenset(b"0123456789")


class JsonTokens:
    """Of each token of a vocabulary, whether it opens or closes something in JSON, or goes on with a number."""

    def __init__(self, table: LLTokenizer, vocabulary: int) -> None:
        self._table, self._vocabulary = table, vocabulary

    def text(self, token: int) -> bytes:
        return self._table.decode_bytes([token])

    @functools.cached_property
    def digits(self) -> torch.Tensor:
        """Those that begin with a digit, bool [vocabulary]."""
        return self._those(lambda text: text[:1].isdigit())

    @functools.cached_property
    def closing(self) -> torch.Tensor:
        """Those that begin with the end of an object or a list, bool [vocabulary]."""
        return self._those(lambda text: text[:1] in (b"]", b"}"))

    @functools.cached_property
    def opening(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that open an object or a list, if they come between strings, and if they come within one; bool [vocabulary] each."""
        return self._those(lambda text: _opens(text, False)), self._those(lambda text: _opens(text, True))

    def _those(self, fit: Callable[[bytes], bool]) -> torch.Tensor:
        """They are looked for when the first answer gets so far."""
        known = range(min(self._vocabulary, self._table.vocab_size))
        found = torch.zeros(self._vocabulary, dtype=torch.bool)
        found[[token for token in known if fit(self.text(token))]] = True
        return found


class JsonBounds:
    """Follows one answer."""

    def __init__(self, tokens: JsonTokens) -> None:
        self._tokens = tokens
        self._place = _Place()

    def took(self, token: int) -> None:
        self._place.read(self._tokens.text(token))

    def unwanted(self) -> Iterator[torch.Tensor]:
        """The tokens that may come next only where no others may, bool [vocabulary]; first the most, of which fewer may be left."""
        if self._place.depth > _DEEPEST and not self._place.in_string:
            yield ~self._tokens.closing
        if self._place.depth >= _DEEPEST:
            yield self._tokens.opening[self._place.in_string]
        if self._place.digits >= _MOST_DIGITS:
            yield self._tokens.digits


class _Place:
    """Where in a text in JSON somebody is: how deep, whether in a string, and how many digits of a number are behind him."""

    def __init__(self, in_string: bool = False) -> None:
        self.in_string = in_string
        self.depth = self.digits = 0
        self._escaped = False

    def read(self, text: bytes) -> bool:
        """Go on; whether anything stands deeper in this text than its beginning."""
        before, deepest = self.depth, self.depth
        for byte in text:
            if self.in_string:
                self.in_string = self._escaped or byte != _QUOTE
                self._escaped = byte == _BACKSLASH and not self._escaped
                continue
            self.digits = self.digits + 1 if byte in _DIGITS else 0
            self.in_string = byte == _QUOTE
            self.depth += (byte in _OPENING) - (byte in _CLOSING)
            deepest = max(deepest, self.depth)
        return deepest > before


def _opens(text: bytes, in_string: bool) -> bool:
    return not _OPENING.isdisjoint(text) and _Place(in_string).read(text)
