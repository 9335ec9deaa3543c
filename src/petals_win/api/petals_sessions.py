"""Chats of old Petals clients: what has been said in each, as token ids, and how an answer to it comes in portions.

Nothing is held in an engine between two questions: each one sends the chat so far, whose beginning engines keep computed.
Knows what these clients ask for; not how it reaches us.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from petals_win.api.errors import ApiError
from petals_win.api.generations import Generations
from petals_win.api.schemas import Text
from petals_win.engines.base import Engine, Finished, GenerationRequest, Token, find_model

MOST_SESSIONS = 64
IDLE_S = 600.0


class Generate(BaseModel):
    """What an answer should be. Either max_length, which counts what was said before, or max_new_tokens is needed."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    inputs: Annotated[Text | None, Field(description="left out: go on from where the session stands")] = None
    max_length: Annotated[int | None, Field(ge=1)] = None
    max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    do_sample: Annotated[bool | None, Field(description="false: always the most likely token")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10)] = None
    stop_sequence: Annotated[Text | None, Field(min_length=1)] = None
    extra_stop_sequences: Annotated[list[Text] | None, Field(max_length=16)] = None

    @field_validator("extra_stop_sequences")
    @classmethod
    def _no_empty_ones(cls, value: list[str] | None) -> list[str] | None:
        if value and not all(value):
            raise ValueError("an empty text ends nothing")
        return value


@dataclass
class Session:
    """One chat: token ids so far, of at most `max_length`."""

    id: str
    model: str
    max_length: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    busy: bool = False
    used: float = 0.0  # when, by the monotonic clock

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """One answer at a time. Raises ApiError."""
        if self.busy:
            raise ApiError(409, "This session is giving an answer. Wait for its end, or open another session.")
        self.busy = True
        try:
            yield
        finally:
            self.busy, self.used = False, time.monotonic()


class Sessions:
    """The open ones of one engine; those that nobody has used for `IDLE_S` seconds are closed."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._open: dict[str, Session] = {}

    def new(self, model: str, max_length: int | None) -> Session:
        """One that is not kept; without a length, as long as the context. Raises ModelNotFound, ApiError."""
        card = find_model(model, self._engine.models())
        if max_length is not None and not 1 <= max_length <= card.context_length:
            raise ApiError(400, f"max_length: 1 to {card.context_length} tokens can be had, not {max_length}.")
        return Session(secrets.token_hex(16), card.id, max_length or card.context_length)

    def open(self, model: str, max_length: int) -> Session:
        """As `new`, and kept until it is closed. Raises ApiError 429 if there are too many."""
        session = self.new(model, max_length)
        self._close_idle()
        if len(self._open) >= MOST_SESSIONS:
            raise ApiError(
                429, f"{MOST_SESSIONS} sessions are open already. Try again later.", headers={"Retry-After": "60"}
            )
        session.used = time.monotonic()
        self._open[session.id] = session
        return session

    def find(self, id: str) -> Session:
        """Raises ApiError 404."""
        self._close_idle()
        if id not in self._open:
            raise ApiError(404, f"There is no such session (any more): it ends when it was idle for {IDLE_S:.0f} s.")
        return self._open[id]

    def close(self, id: str) -> None:
        """Closing one that is not open does nothing."""
        self._open.pop(id, None)

    def _close_idle(self) -> None:
        now = time.monotonic()
        for session in list(self._open.values()):
            if not session.busy and now - session.used > IDLE_S:
                self.close(session.id)


@dataclass(frozen=True)
class Portion:
    """The next part of an answer: its text, whether it is the last, and how many tokens it has."""

    outputs: str
    stop: bool
    token_count: int


async def portions(
    engine: Engine, generations: Generations, session: Session, asked: Generate
) -> AsyncGenerator[Portion, None]:
    """Answer in a session: in one portion, or where there is a stop sequence in several until that has come.

    What was told is part of the session afterwards, also when an error ends it; an error before leaves it as it was.
    Whoever consumes this may stop at any point by `aclose()`. Raises ApiError, UserError.
    """
    with session.in_use():
        begun = await _begun(engine, session, asked)
        stop = await _stop_token(engine, session.model, asked)
        step, limit = _lengths(asked, len(begun), session.max_length)
        answer = generations.start([_request(session.model, begun, limit, asked, stop)])
        whole, text = "", ""
        told: list[int] = []  # token ids
        new: list[int] = []
        try:
            ended = False
            async for _, event in answer:
                match event:
                    case Token(piece, ids=ids):
                        whole, text = whole + piece, text + piece
                        new += ids
                        if asked.stop_sequence and len(new) >= step:
                            ended = _ends(whole, asked)
                            told += new
                            if ended and not whole.endswith(asked.stop_sequence) and stop is not None:
                                told[-1] = stop  # so that the next turn begins behind one that ended as it should
                            yield Portion(text, ended, len(new))
                            text, new = "", []
                            if ended:
                                return
                    case Finished(reason, ids=ids):
                        new += ids
                        ended = reason != "length" or not asked.stop_sequence
            told += new
            if asked.stop_sequence and told and told[-1] == stop and not whole.endswith(asked.stop_sequence):
                text += asked.stop_sequence
            if ended or text:
                yield Portion(text, ended, len(new))
            if not ended:
                raise ApiError(
                    400,
                    f"The {session.max_length} tokens of the session are used up before the stop sequence has come. "
                    "Open one with a larger max_length.",
                )
        finally:
            await answer.aclose()
            if told:
                session.tokens = array("i", (*begun, *told))


async def _begun(engine: Engine, session: Session, asked: Generate) -> tuple[int, ...]:
    """The chat so far, with what is new. The tokens that begin a text come once."""
    begun = tuple(session.tokens)
    if asked.inputs:
        request = GenerationRequest(model=session.model, prompt=asked.inputs)
        begun += tuple(await engine.tokenize(request, special=not begun))
    if not begun:
        raise ApiError(400, "inputs: there is nothing to go on from yet. Send some text.", param="inputs")
    return begun


async def _stop_token(engine: Engine, model: str, asked: Generate) -> int | None:
    """The token that the stop sequence is, if it is one. Raises ApiError where it would have to be."""
    tokens: list[int] = []
    if asked.stop_sequence:
        tokens = await engine.tokenize(GenerationRequest(model=model, prompt=asked.stop_sequence), special=False)
    if asked.extra_stop_sequences and len(tokens) != 1:
        raise ApiError(
            400,
            "extra_stop_sequences: a stop_sequence is needed, too, and it has to be exactly one token, "
            f"but it has {len(tokens)}.",
            param="extra_stop_sequences",
        )
    return tokens[0] if len(tokens) == 1 else None


def _lengths(asked: Generate, begun: int, longest: int) -> tuple[int, int]:
    """Tokens of a portion, and of the whole answer at most. Raises ApiError if there is no room for them."""
    lengths = [asked.max_new_tokens] if asked.max_new_tokens else []
    lengths += [asked.max_length - begun] if asked.max_length else []
    if not lengths:
        raise ApiError(400, "max_length or max_new_tokens is needed.", param="max_new_tokens")
    step = min(lengths)
    if step < 1:
        raise ApiError(400, f"max_length: {asked.max_length} tokens are too few, for there are {begun} already.")
    if begun + (1 if asked.stop_sequence else step) > longest:
        raise ApiError(
            400,
            f"The session has room for {longest} tokens, of which {begun} are taken, so {step} more do not fit. "
            "Open one with a larger max_length.",
        )
    if not asked.stop_sequence:
        return step, step
    return step, (longest if asked.max_length is None else min(longest, asked.max_length)) - begun


def _request(model: str, begun: tuple[int, ...], limit: int, asked: Generate, stop: int | None) -> GenerationRequest:
    return GenerationRequest(
        model=model,
        prompt=begun,
        max_tokens=limit,
        temperature=asked.temperature if asked.do_sample else 0,
        top_k=asked.top_k,
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
        stop_tokens=() if stop is None else (stop,),
    )


def _ends(text: str, asked: Generate) -> bool:
    ends = (asked.stop_sequence or "", *(asked.extra_stop_sequences or ()))
    return text.endswith(tuple(end for end in ends if end))
