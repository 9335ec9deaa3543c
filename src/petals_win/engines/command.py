"""The engine "command": a native runtime as a child process, here one that speaks lines of JSON (docs/command-engine.md).

Knows how answers share the runtime, and when it is started again. Does not know what it computes with.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from petals_win.engines.base import (
    ContextTooLong,
    EngineClosed,
    Event,
    Finished,
    Full,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    SwarmStatus,
    Thought,
    Token,
    Usage,
)
from petals_win.engines.command_cli import CliEngine
from petals_win.engines.command_file import Described, read_description
from petals_win.engines.command_link import Link
from petals_win.engines.command_messages import Done, Failure, Hello, Message, Option, Pong, Started, TokenPiece
from petals_win.engines.outside import Places, ProgramFailed, ProgramUnavailable, options_for
from petals_win.engines.registry import EngineSettings
from petals_win.engines.stopping import StopStrings
from petals_win.errors import UserError, printable

logger = logging.getLogger(__name__)

_LOOK_S = 1.0  # between two looks at whether it is silent
_KNOWN_OPTIONS = frozenset(Option.__args__)


def open_engine(settings: EngineSettings) -> CommandEngine | CliEngine:
    """Start the runtime that the file describes, if it is not one for each question, and let it load its models. Raises UserError."""
    if given := settings.for_blocks():
        raise UserError(f"{given[0]} is of no use to the engine 'command': its TOML file says what the runtime needs.")
    described = read_description(settings.model)
    if described.dialect == "cli":
        return CliEngine(described)
    link = Link(described)
    return CommandEngine(described, link, *link.shake_hands())


class _Answer:
    """One answer in the making: what the runtime has said of it and nobody has read."""

    def __init__(self, most_tokens: int, most_bytes: int):
        self.inbox: asyncio.Queue[Started | TokenPiece | Done | Failure | UserError] = asyncio.Queue()
        self.tokens = self.bytes = 0
        self.most_tokens, self.most_bytes = most_tokens, most_bytes
        self.started = False
        self.ended = asyncio.Event()


class CommandEngine:
    """An Engine whose answers a runtime computes, several at once if it can."""

    def __init__(self, described: Described, link: Link, hello: Hello, contexts: dict[str, int]):
        self._described, self._limits = described, described.limits
        self._link: Link | None = link
        self._opening: Link | None = None
        self._hello, self._contexts = hello, contexts
        self._created = int(time.time())
        at_once = min(hello.at_once, self._limits.at_once or hello.at_once)
        self._places = Places(described.named.capitalize(), at_once, self._limits.waiting_seconds)
        self._answers: dict[str, _Answer] = {}
        self._ids = itertools.count(1)
        self._failures = 0  # lives one after the other in which nothing was answered
        self._down = ""
        self._keepers: set[asyncio.Task[None]] = set()  # of the runtime
        self._leaving: set[asyncio.Task[None]] = set()  # of answers
        self._on_lost: Callable[[UserError], None] = lambda _: None
        self._closed = False

    @property
    def running(self) -> int:
        """Answers that the runtime works on, as far as is known here."""
        return len(self._answers) + self._places.taken

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        self._on_lost = on_lost
        assert self._link is not None
        self._attach(self._link)
        _keep(self._watch(), self._keepers)

    def models(self) -> list[ModelCard]:
        return [ModelCard(name, self._created, context) for name, context in self._contexts.items()]

    def status(self) -> SwarmStatus:
        if self._closed:
            return SwarmStatus(False, "petals-win is ending.")
        if self._link is None or self._link.why is not None:
            return SwarmStatus(False, self._down or f"{self._described.named.capitalize()} is being ended.")
        return SwarmStatus(True, f"{self._described.named.capitalize()} runs.")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        context = self._context(request.model)
        body = self._body(request, context)
        stops = StopStrings(request.stop)
        prompt_tokens, cached, generated, reason = 0, 0, 0, ""
        async with contextlib.aclosing(self._messages(body, context)) as messages:
            async for message in messages:
                if isinstance(message, Started):
                    prompt_tokens, cached = message.prompt_tokens, message.cached_tokens
                    continue
                if isinstance(message, Done):
                    reason = message.reason
                    break
                generated += message.tokens
                text = message.text if message.thought else stops.feed(message.text)
                if text:
                    if request.count_along:
                        yield Usage(prompt_tokens, generated, cached)
                    yield Thought(text) if message.thought else Token(text)
                if stops.stopped:
                    reason = "stop"
                    break
        if rest := stops.flush():
            yield Token(rest)
        yield Finished("length" if reason == "length" else "stop", stops.met)
        yield Usage(prompt_tokens, generated, cached)

    def _body(self, request: GenerationRequest, context: int) -> dict[str, Any]:
        """The message that asks for the answer. Raises UserError for what the runtime cannot do."""
        if isinstance(request.prompt, tuple):
            raise UserError(f"{request.model} takes text, and no token ids.")
        kind = "text" if request.messages is None else "messages"
        if kind not in self._hello.inputs:
            other = "a prompt to /v1/completions" if kind == "messages" else "messages to /v1/chat/completions"
            raise UserError(f"{request.model} does not take {kind}. Send {other} instead.")
        can = {"temperature", *_KNOWN_OPTIONS.intersection(self._hello.options)}
        options = options_for(request.model, request, can, self._described.ignore)
        asked = {"text": request.prompt} if request.messages is None else {"messages": list(request.messages)}
        most = None if request.max_tokens is None else min(request.max_tokens, context)
        return {"type": "generate", "model": request.model, **asked, "max_tokens": most, "options": options}

    async def _messages(self, body: dict[str, Any], context: int) -> AsyncGenerator[Started | TokenPiece | Done, None]:
        """What the runtime says to a request, in which the order of the protocol is kept. Raises UserError."""
        async with self._places.one():
            link = self._running_link()
            id, answer = str(next(self._ids)), _Answer(body["max_tokens"] or context, self._limits.answer_bytes)
            self._answers[id] = answer
            try:
                link.send({**body, "id": id})
                patience = self._limits.first_token_seconds
                while True:
                    try:
                        async with asyncio.timeout(patience):
                            message = await answer.inbox.get()
                    except TimeoutError:
                        raise ProgramFailed(
                            f"{self._described.named.capitalize()} has said nothing of this answer for {patience:g} s. Try again."
                        ) from None
                    if isinstance(message, UserError):
                        raise message
                    if isinstance(message, Failure):
                        raise self._told(message, context)
                    if isinstance(message, TokenPiece):
                        answer.bytes -= len(message.text)
                        patience = self._limits.token_seconds
                    if self._closed:
                        raise EngineClosed()
                    yield message
            finally:
                # In a task of its own: whoever leaves may be cancelled once more while the runtime stops.
                await asyncio.shield(_keep(self._give_up(link, id, answer), self._leaving))

    async def _give_up(self, link: Link, id: str, answer: _Answer) -> None:
        """Afterwards the runtime does not work on the answer any more."""
        try:
            if answer.ended.is_set():
                return
            link.send({"type": "cancel", "id": id})
            async with asyncio.timeout(self._limits.cancel_seconds):
                await answer.ended.wait()
        except TimeoutError:
            link.fail(f"it does not stop an answer within {self._limits.cancel_seconds:g} s (cancel_seconds)")
        finally:
            self._answers.pop(id, None)

    def _told(self, failure: Failure, context: int) -> UserError:
        said = printable(failure.message)
        match failure.kind:
            case "context":
                return ContextTooLong(failure.prompt_tokens, context)
            case "full":
                return Full(said or f"{self._described.named.capitalize()} has no room now. Try again in a moment.")
            case "refused":
                return UserError(said or f"{self._described.named.capitalize()} refuses this request.")
            case _:
                return ProgramFailed(f"{self._described.named.capitalize()} failed: {said or 'it does not say why'}")

    def _attach(self, link: Link) -> None:
        link.attach(asyncio.get_running_loop(), lambda message: self._take(link, message))

    def _take(self, link: Link, message: Message | None) -> None:
        """A message of the life that is current, or its end."""
        if link is not self._link:
            return
        if message is None:
            self._is_over(link)
        elif link.failed:
            return
        elif isinstance(message, Started | TokenPiece | Done | Failure):
            if problem := self._hand_over(message):
                link.fail(problem)
        elif not isinstance(message, Pong):
            link.fail(f"it sent {message.type!r} when nobody had asked")

    def _hand_over(self, message: Started | TokenPiece | Done | Failure) -> str | None:
        """Give a message to its answer; returns what is wrong with it."""
        answer = self._answers.get(message.id or "")
        if answer is None or answer.ended.is_set():
            return f"it sent {message.type!r} for an answer that nobody has asked for, or that is complete"
        match message:
            case Started():
                if answer.started:
                    return "it began an answer twice"
                answer.started = True
            case TokenPiece(text=text, tokens=tokens):
                answer.tokens, answer.bytes = answer.tokens + tokens, answer.bytes + len(text)
                if not answer.started:
                    return "it sent a token before 'started'"
                if answer.tokens > answer.most_tokens:
                    return f"it sent more than the {answer.most_tokens} tokens that an answer may have"
                if answer.bytes > answer.most_bytes:
                    return "it sent more text than an answer may have (answer_bytes)"
            case Done(reason=reason):
                if reason != "cancelled" and not answer.started:
                    return "it ended an answer that it had not begun"
                answer.ended.set()
                self._failures = 0
            case Failure():
                answer.ended.set()
        answer.inbox.put_nowait(message)
        return None

    def _is_over(self, link: Link) -> None:
        self._link = None
        if not self._closed:
            self._down = f"{self._described.named.capitalize()} is not running: {link.why}."
            logger.warning("%s", self._down)
        for answer in self._answers.values():
            if not answer.ended.is_set():
                answer.ended.set()
                answer.inbox.put_nowait(EngineClosed() if self._closed else ProgramFailed(f"{self._down} Try again."))
        if not self._closed:
            _keep(self._start_again(), self._keepers)

    async def _start_again(self) -> None:
        policy, last = self._described.restart, self._down
        while not self._closed:
            self._failures += 1
            if self._failures > policy.attempts:
                why = f"{last} It was started {policy.attempts} times more, in vain. Its lines in the log tell more."
                self._down = why
                self._on_lost(ProgramUnavailable(why))
                return
            wait = min(policy.first_wait_seconds * 2 ** (self._failures - 1), policy.longest_wait_seconds)
            self._down = f"{last} It is started again in {wait:g} s."
            await asyncio.sleep(wait)
            try:
                link, hello, contexts = await asyncio.to_thread(self._open)
            except UserError as e:
                last = str(e)
                continue
            if self._closed:
                await asyncio.to_thread(link.stop)
                return
            self._link, self._opening, self._hello, self._contexts = link, None, hello, contexts
            self._attach(link)
            return

    def _open(self) -> tuple[Link, Hello, dict[str, int]]:
        link = self._opening = Link(self._described)
        return link, *link.shake_hands()

    async def _watch(self) -> None:
        """Ask for a sign of life where there was none for long, and end what gives none."""
        asked: tuple[Link, float] | None = None
        while not self._closed:
            await asyncio.sleep(_LOOK_S)
            link = self._link
            if link is None:
                continue
            silent = time.monotonic() - link.heard
            if silent > self._limits.silence_seconds and asked is not None and asked[0] is link:
                link.fail(f"it has given no sign of life for {silent:.0f} s (silence_seconds)")
            elif silent > self._limits.silence_seconds / 2 and asked != (link, link.heard):
                asked = (link, link.heard)
                link.send({"type": "ping"})

    def _running_link(self) -> Link:
        if self._closed:
            raise EngineClosed()
        if self._link is None or self._link.why is not None:
            raise ProgramUnavailable(self._down or f"{self._described.named.capitalize()} is not running. Try again.")
        return self._link

    def _context(self, model: str) -> int:
        if self._closed:
            raise EngineClosed()
        if model not in self._contexts:
            raise ModelNotFound(model, list(self._contexts))
        return self._contexts[model]

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        self._context(request.model)
        raise UserError(f"{request.model} is computed by a program that tells no token ids.")

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        self._context(model)
        raise UserError(f"{model} is computed by a program that tells no token ids.")

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        self._context(model)
        raise UserError(f"{model} is computed by a program that makes no embeddings.")

    async def close(self) -> None:
        self._closed = True
        for answer in self._answers.values():
            answer.inbox.put_nowait(EngineClosed())
            answer.ended.set()
        for task in self._keepers:
            task.cancel()
        links = {link for link in (self._link, self._opening) if link is not None}
        self._link = self._opening = None
        await asyncio.gather(*(asyncio.to_thread(link.stop) for link in links))


def _keep(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
