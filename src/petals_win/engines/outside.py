"""What engines share whose answers are computed by another program: its failures, a line for its places, held log probabilities.

Knows the engine protocol. Does not know which program it is, nor how it is talked to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Collection

from petals_win.engines.base import ChosenToken, Full, GenerationRequest, SwarmFailed, SwarmUnavailable
from petals_win.errors import UserError

_BYTES_OF_A_TOKEN = 4


class ProgramFailed(SwarmFailed):
    """The program that answers has failed at this answer; `reason` is a whole sentence."""

    def __init__(self, reason: str):
        UserError.__init__(self, reason)


class ProgramUnavailable(SwarmUnavailable):
    """The program that answers is not there now; `reason` is a whole sentence."""

    def __init__(self, reason: str):
        UserError.__init__(self, reason)
        self.missing_blocks = ()


class Places:
    """So many answers at once; the others wait in a line, but not for ever."""

    def __init__(self, name: str, places: int, patience_s: float):
        self._name, self._places, self.patience_s = name, places, patience_s
        self._free = asyncio.Semaphore(places)
        self.taken = 0

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A place, for as long as the block runs. Raises Full if none gets free in time."""
        try:
            async with asyncio.timeout(self.patience_s):
                await self._free.acquire()
        except TimeoutError:
            raise Full(
                f"{self._name} answers {self._places} questions at once, and none of its places got free within "
                f"{self.patience_s:g} s. Try again in a moment."
            ) from None
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._free.release()


class HeldTokens:
    """The tokens of one answer with log probabilities whose text is still held back."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, ChosenToken]] = deque()  # with where its text begins, in bytes
        self._length = self._shown = 0

    def came(self, tokens: Collection[ChosenToken]) -> None:
        for token in tokens:
            self._held.append((self._length, token))
            self._length += len(token.text)

    def shown(self, piece: str) -> tuple[ChosenToken, ...]:
        """The tokens whose text begins in the next piece that is shown."""
        self._shown += len(piece.encode())
        told = []
        while self._held and self._held[0][0] < self._shown:
            told.append(self._held.popleft()[1])
        return tuple(told)


def guessed_tokens(text: str) -> int:
    """About how many tokens a text has, where nobody counts them."""
    return -(-len(text.encode()) // _BYTES_OF_A_TOKEN)


def asked_for(request: GenerationRequest) -> dict[str, object]:
    """What a request asks for beside its prompt, max_tokens and stop strings, by the names of the API's fields."""
    asked: dict[str, object] = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs")
        if (value := getattr(request, name)) is not None
    }
    for name in ("frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos", "logit_bias"):
        if value := getattr(request, name):
            asked[name] = value
    if request.stop_tokens:
        asked["stop_token_ids"] = list(request.stop_tokens)
    if request.tools and request.tool_choice != "none":
        asked["tools"] = list(request.tools)
    if request.constraint is not None:
        asked[request.constraint.kind] = request.constraint.text
    if request.template:
        asked["chat_template_kwargs"] = dict(request.template)
    if request.messages is not None:
        if request.continue_final:
            asked["continue_final_message"] = True
        elif not request.generation_prompt:
            asked["add_generation_prompt"] = False
    return asked


# What asks for nothing: the answer is the same without it.
_NEUTRAL: dict[str, object] = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


def options_for(program: str, request: GenerationRequest, can: Collection[str], passed_over: Collection[str]) -> dict:
    """Of what a request asks for, that which the program can do.

    passed_over: what the user has allowed to be left out. Raises UserError that names the first of what is left.
    """
    options = {}
    for name, value in asked_for(request).items():
        if name in can:
            options[name] = value
        elif name not in passed_over and _NEUTRAL.get(name, ...) != value:
            raise UserError(f"{name}: {program} cannot do that. Leave it out.")
    return options
