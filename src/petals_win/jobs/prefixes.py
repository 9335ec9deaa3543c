"""Which worker has computed the beginning of a prompt before. Knows requests and names of workers; remembers hashes, no text."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator

from petals_win.engines.base import GenerationRequest

_MOST = 8192  # beginnings that are remembered, of some 150 bytes each
_PIECE = 1024  # characters of a text, or a quarter as many token ids
_DEEPEST = 64  # beginnings of one prompt: the last ones, if it has more


class Prompt:
    """A prompt as beginnings that grow, piece by piece: after each its hash and how many characters it has."""

    def __init__(self, request: GenerationRequest):
        before = hashlib.blake2b(request.model.encode(), digest_size=16)
        length = 0
        beginnings: list[tuple[bytes, int]] = []
        for piece in _pieces(request):
            before.update(piece)
            length += len(piece)
            beginnings.append((before.digest(), length))
        self.beginnings = beginnings[-_DEEPEST:]
        self.length = length


class Prefixes:
    """The workers that answered last, by the beginnings of the prompts."""

    def __init__(self) -> None:
        self._workers: OrderedDict[bytes, str] = OrderedDict()

    def answered(self, prompt: Prompt, worker: str) -> None:
        """The worker has the prompt computed now."""
        for digest, _ in prompt.beginnings:
            self._workers[digest] = worker
            self._workers.move_to_end(digest)
        while len(self._workers) > _MOST:
            self._workers.popitem(last=False)

    def known(self, prompt: Prompt) -> dict[str, int]:
        """How many characters of the prompt workers have likely computed; those that have none are left out."""
        known: dict[str, int] = {}
        for digest, length in prompt.beginnings:
            if (worker := self._workers.get(digest)) is not None:
                known[worker] = length
        return known


def _pieces(request: GenerationRequest) -> Iterator[bytes]:
    if request.messages is not None:
        yield json.dumps([request.tools, dict(request.template)], default=str).encode()
        for turn in request.messages:
            yield json.dumps(turn, default=str).encode()
    elif isinstance(request.prompt, str):
        for start in range(0, len(request.prompt), _PIECE):
            yield request.prompt[start : start + _PIECE].encode(errors="replace")
    elif request.prompt is not None:
        for start in range(0, len(request.prompt), _PIECE // 4):
            yield b",".join(b"%d" % token for token in request.prompt[start : start + _PIECE // 4])
