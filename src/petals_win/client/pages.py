"""Names for the beginnings of prompts, by which nodes find again what an earlier session has left.

Knows token ids. Does not know who asks for what.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b
from itertools import takewhile

import numpy as np

from petals_win.span.prefixes import PAGE_TOKENS

# Without it a node could tell from a hash which of the texts that it knows was sent. It is as old as the process, since nodes know
# a client by its peer id, which is no older.
_SALT = secrets.token_bytes(32)
_HASH_BYTES = 16
_MOST_LEFT = 2**16


def page_hashes(tokens: Sequence[int], about: str) -> list[bytes]:
    """A hash for each whole page of tokens, which covers all tokens up to the end of the page.

    :param about: what else the blocks' outputs depend on: the model's content, an adapter
    """
    found, last = [], blake2b(about.encode(), key=_SALT, digest_size=_HASH_BYTES).digest()
    for begin in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = np.asarray(tokens[begin : begin + PAGE_TOKENS], dtype="<i8").tobytes()
        last = blake2b(last + page, key=_SALT, digest_size=_HASH_BYTES).digest()
        found.append(last)
    return found


class LeftPages:
    """What the sessions of one client have left at nodes, the newest pages of it: nodes need not be asked for anything else."""

    def __init__(self) -> None:
        self._pages: dict[bytes, None] = {}

    def add(self, pages: Sequence[bytes]) -> None:
        for page in pages:
            self._pages.pop(page, None)
            self._pages[page] = None
        while len(self._pages) > _MOST_LEFT:
            del self._pages[next(iter(self._pages))]

    def among(self, pages: Sequence[bytes]) -> list[bytes]:
        """As many of the first of these pages as have been left."""
        return list(takewhile(self._pages.__contains__, pages))
