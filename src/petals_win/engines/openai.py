"""The engine "openai": models of another server that speaks OpenAI's API: Ollama, LM Studio, llama-server, vLLM, petals-win.

Knows the server: its address, its models, its errors, and how long it may be silent. Trusts nothing that it sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx

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
)
from petals_win.engines.openai_requests import path_and_body
from petals_win.engines.openai_stream import StreamEvents
from petals_win.engines.outside import ProgramFailed, ProgramUnavailable
from petals_win.engines.registry import EngineSettings
from petals_win.errors import UserError, printable
from petals_win.host.addresses import is_loopback_host
from petals_win.host.programs import Lines

logger = logging.getLogger(__name__)

_ASSUMED_CONTEXT = 4096  # tokens, of a model whose server does not tell
_CONNECT_S, _LOOK_S, _SHORT_S = 10.0, 30.0, 30.0
_SILENCE_S = 120.0  # between two signs of life of an answer
_EVENT_S = 900.0  # between two events of it
_LONGEST_LINE, _LONGEST_REPLY, _LONGEST_ERROR = 4 * 2**20, 64 * 2**20, 64 * 2**10
_MOST_MODELS = 1000
_IN_CONTEXT = re.compile(r"has (\d+) tokens, but prompt and answer together may have (\d+)")


def open_engine(settings: EngineSettings) -> OpenAIEngine:
    """Look at the server's models. Raises UserError if it cannot be reached, or has no such model."""
    if given := settings.for_blocks():
        raise UserError(f"{given[0]} is of no use to the engine 'openai', whose models another server computes.")
    if not settings.base_url:
        raise UserError("Which server? Give --base-url with its address, such as http://127.0.0.1:11434/v1.")
    engine = OpenAIEngine(settings.base_url, settings.upstream_key, settings.model)
    asyncio.run(engine.look_first())
    return engine


class OpenAIEngine:
    """An Engine whose answers another server computes. `model`: the only one that is offered; empty: all that it has."""

    def __init__(self, base_url: str, key: str | None = None, model: str = ""):
        parts = _checked(base_url)
        self._base, self._root = base_url.rstrip("/"), f"{parts.scheme}://{parts.netloc}"
        self._host, self._only = parts.netloc, model
        self._headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        # A proxy, of the environment or of Windows' settings, would look for this PC on its own.
        self._trust_env = not is_loopback_host(parts.hostname or "")
        # Reading the certificates takes a while, and without TLS, and a proxy that has it, there is nothing to check.
        self._verify = self._trust_env or parts.scheme == "https"
        self._cards: list[ModelCard] = []
        self._told: set[str] = set()
        self._problem = ""
        self._http: httpx.AsyncClient | None = None
        self._waiting: set[asyncio.Timeout] = set()
        self._looking: asyncio.Task[None] | None = None
        self.running = 0
        self._closed = False

    async def look_first(self) -> None:
        """Raises UserError if the server cannot be used."""
        async with self._client() as self._http:
            await self._look()
        self._http = None
        if not self._cards:
            raise UserError(f"The server at {self._base} has no models. Load one there, and start again.")

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        self._http = self._client()
        self._looking = asyncio.create_task(self._keep_looking())

    def models(self) -> list[ModelCard]:
        return list(self._cards)

    def status(self) -> SwarmStatus:
        if self._closed:
            return SwarmStatus(False, "petals-win is ending.")
        return SwarmStatus(not self._problem, self._problem or f"The server at {self._host} answers.")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        card = self._card(request.model)
        path, body = path_and_body(request)
        events = StreamEvents(request)
        self.running += 1
        try:
            async with contextlib.aclosing(self._data(f"{self._base}/{path}", body, card)) as pieces:
                async for data in pieces:
                    for event in events.feed(data):
                        if request.count_along:
                            yield events.usage
                        yield event
                    if events.stop_string is not None:
                        break
                else:
                    if events.reason is None:
                        raise ProgramFailed(
                            f"The server at {self._host} broke off its answer in the middle. Try again."
                        )
        finally:
            self.running -= 1
        for event in events.flush():
            yield event
        yield Finished("stop" if events.stop_string is not None else events.reason or "stop", events.stop_string)
        yield events.usage

    async def _data(self, url: str, body: dict[str, Any], card: ModelCard) -> AsyncGenerator[str, None]:
        """The data of each server-sent event, up to the last one."""
        lines, event = Lines(_LONGEST_LINE), time.monotonic()
        async with self._posted(url, body, card) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                raise ProgramFailed(f"The server at {self._host} does not stream its answer. Is --base-url right?")
            chunks = response.aiter_raw()
            while True:
                chunk = await self._within(_SILENCE_S, anext(chunks, None))
                if chunk is None:
                    return
                try:
                    complete = lines.feed(chunk)
                except ValueError as e:
                    raise ProgramFailed(f"The server at {self._host} sent {e}.") from None
                for line in complete:
                    name, _, data = line.rstrip(b"\r").partition(b":")
                    if name != b"data":
                        continue
                    event = time.monotonic()
                    try:
                        text = data.decode().strip()
                    except UnicodeDecodeError:
                        raise ProgramFailed(f"The server at {self._host} sent bytes that are no text.") from None
                    if text == "[DONE]":
                        return
                    yield text
                    if self._closed:
                        raise EngineClosed()
                if time.monotonic() - event > _EVENT_S:
                    raise ProgramFailed(
                        f"The server at {self._host} has sent no piece of this answer for {_EVENT_S:.0f} s."
                    )

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        card = self._card(request.model)
        if isinstance(request.prompt, tuple):
            return list(request.prompt)
        body: dict[str, Any] = {"model": request.model}
        if request.messages is None:
            body |= {"prompt": request.prompt, "add_special_tokens": special}
        else:
            asked = path_and_body(request)[1]
            kept = ("messages", "tools", "chat_template_kwargs", "continue_final_message", "add_generation_prompt")
            body |= {name: asked[name] for name in kept if name in asked}
        tokens = (await self._asked(f"{self._root}/tokenize", body, card, "/tokenize")).get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ProgramFailed(f"The tokens that the server at {self._host} tells cannot be read.")
        return tokens

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        card = self._card(model)
        body = {"model": model, "tokens": list(tokens)}
        text = (await self._asked(f"{self._root}/detokenize", body, card, "/detokenize")).get("prompt")
        if not isinstance(text, str):
            raise ProgramFailed(f"The text that the server at {self._host} tells cannot be read.")
        return text

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        card = self._card(model)
        if not tokens:
            raise UserError("The text is empty. Send at least one token.")
        self.running += 1
        try:
            body = {"model": model, "input": [list(tokens)], "encoding_format": "float"}
            reply = await self._asked(f"{self._base}/embeddings", body, card, "embeddings", _SILENCE_S)
        finally:
            self.running -= 1
        try:
            vector = [float(number) for number in reply["data"][0]["embedding"]]
            length = math.hypot(*vector)
            return [number / length for number in vector]
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            raise ProgramFailed(f"The embeddings of the server at {self._host} cannot be read.") from None

    async def close(self) -> None:
        self._closed = True
        for waiting in self._waiting:
            with contextlib.suppress(RuntimeError):  # it is over
                waiting.reschedule(asyncio.get_running_loop().time())
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        # Those that wait have left by then, so that nobody reads from a connection that is taken away.
        for _ in range(100):
            if not self._waiting:
                break
            await asyncio.sleep(0.01)
        if self._http is not None:
            await self._http.aclose()

    def _client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=20)
        return httpx.AsyncClient(
            headers=self._headers, timeout=timeout, limits=limits, trust_env=self._trust_env, verify=self._verify
        )

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
                self._problem = ""
            except UserError as e:
                if not self._problem:
                    logger.warning("%s", e)
                self._problem = str(e)

    async def _look(self) -> None:
        """Ask which models there are. Raises UserError."""
        reply = await self._asked(f"{self._base}/models", None, None, "/models")
        listed = reply.get("data")
        if not isinstance(listed, list) or len(listed) > _MOST_MODELS:
            raise ProgramFailed(f"{self._base}/models is no list of models. Is --base-url right?")
        cards = [self._card_of(told) for told in listed if isinstance(told, dict) and isinstance(told.get("id"), str)]
        found = [card for card in cards if not self._only or card.id == self._only]
        if self._only and not found:
            raise ModelNotFound(self._only, [card.id for card in cards])
        # A list that is empty for a moment, while the server loads, takes nobody's model away.
        self._cards = found or self._cards

    def _card_of(self, told: dict[str, Any]) -> ModelCard:
        meta = told.get("meta")
        lengths = [told.get(name) for name in ("context_length", "max_model_len", "max_context_length")]
        lengths += [meta.get(name) for name in ("n_ctx", "n_ctx_train")] if isinstance(meta, dict) else []
        context = next((length for length in lengths if type(length) is int and 1 < length < 2**31), None)
        name = printable(told["id"])
        if context is None and name not in self._told:
            self._told.add(name)
            logger.warning(
                "The server does not tell the context of %s; clients are told %d tokens", name, _ASSUMED_CONTEXT
            )
        created = told.get("created")
        # The time only tells models apart; one that says none is as old as its server's first answer.
        since = created if type(created) is int and 0 < created < 2**40 else int(time.time())
        return ModelCard(told["id"][:200], since, context or _ASSUMED_CONTEXT)

    async def _asked(
        self, url: str, body: dict[str, Any] | None, card: ModelCard | None, what: str, seconds: float = _SHORT_S
    ) -> dict[str, Any]:
        """A whole reply, which is an object. Raises UserError."""
        async with self._posted(url, body, card, what, seconds) as response:
            data = await self._read(response, _LONGEST_REPLY, seconds)
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise ProgramFailed(
                f"What the server at {self._host} says to {what} is no JSON object. Is --base-url right?"
            )
        return reply

    @contextlib.asynccontextmanager
    async def _posted(
        self,
        url: str,
        body: dict[str, Any] | None,
        card: ModelCard | None,
        what: str = "answers",
        seconds: float = _EVENT_S,
    ) -> AsyncIterator[httpx.Response]:
        """The response to a request (POST, or GET without a body) that has succeeded. Raises UserError."""
        if self._closed:
            raise EngineClosed()
        if self._http is None:
            raise RuntimeError("The engine was not started")
        request = self._http.build_request("GET" if body is None else "POST", url, json=body)
        try:
            response = await self._within(seconds, self._http.send(request, stream=True))
            try:
                if response.status_code != 200:
                    raise await self._error(response, card, what)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise ProgramFailed(f"The server at {self._host} packs its answers, though it was asked not to.")
                yield response
            finally:
                await response.aclose()
        except httpx.ConnectError as e:
            raise ProgramUnavailable(
                f"Nothing answers at {self._base} ({printable(str(e))}). Start the server there, or correct --base-url."
            ) from e
        except httpx.HTTPError as e:
            if self._closed:
                raise EngineClosed() from e
            raise ProgramFailed(f"The server at {self._host} broke off: {type(e).__name__}. Try again.") from e

    async def _within(self, seconds: float, work: Any) -> Any:
        """The result of waiting for the server. Raises ProgramFailed if it takes too long, EngineClosed if we are closed."""
        try:
            async with asyncio.timeout(seconds) as waiting:
                self._waiting.add(waiting)
                try:
                    return await work
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError as e:
            if self._closed:
                raise EngineClosed() from e
            raise ProgramFailed(f"The server at {self._host} was silent for {seconds:.0f} s. Try again.") from e

    async def _read(self, response: httpx.Response, most: int, seconds: float) -> bytes:
        data = bytearray()
        chunks = response.aiter_raw()
        until = time.monotonic() + seconds
        while (chunk := await self._within(max(0.01, until - time.monotonic()), anext(chunks, None))) is not None:
            data += chunk
            if len(data) > most:
                raise ProgramFailed(f"The server at {self._host} sent more than {most} bytes at once.")
        return bytes(data)

    async def _error(self, response: httpx.Response, card: ModelCard | None, what: str) -> UserError:
        """What a status other than success means."""
        status = response.status_code
        if 300 <= status < 400:
            return UserError(
                f"The server at {self._host} answers from another address. Give --base-url with that one."
            )
        told: Any = {}
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(await self._read(response, _LONGEST_ERROR, _SHORT_S))
        error = told.get("error", told) if isinstance(told, dict) else {}
        said = printable(str(error.get("message", "") if isinstance(error, dict) else error)) or "it does not say why"
        kind = {error.get("code"), error.get("type")} if isinstance(error, dict) else set()
        if card is not None and kind & {"context_length_exceeded", "exceed_context_size_error"}:
            return _TooLong(said, cast(dict[str, Any], error), card)
        match status:
            case 401 | 403:
                return UserError(
                    f"The server at {self._host} wants another key ({said}). Give it by --upstream-key-file."
                )
            case 404 | 405 if what != "answers":
                return UserError(
                    f"The server at {self._host} has no {what}, which tells token ids or vectors of a text."
                )
            case 404:
                return UserError(f"The server at {self._host} does not know this model or path: {said}")
            case 429 | 503:
                return Full(f"The server at {self._host} has no room now: {said}")
            case _ if status < 500:
                return UserError(f"The server at {self._host} refuses the request: {said}")
            case _:
                return ProgramFailed(f"The server at {self._host} failed with status {status}: {said}")

    def _card(self, model: str) -> ModelCard:
        if self._closed:
            raise EngineClosed()
        for card in self._cards:
            if card.id == model:
                return card
        raise ModelNotFound(model, [card.id for card in self._cards])


class _TooLong(ContextTooLong):
    """In the words of the other server, which knows best."""

    def __init__(self, said: str, error: dict[str, Any], card: ModelCard):
        numbers = _IN_CONTEXT.search(said)
        counted = (int(numbers[1]), int(numbers[2])) if numbers else (error.get("n_prompt_tokens"), error.get("n_ctx"))
        prompt, context = (number if isinstance(number, int) else None for number in counted)
        super().__init__(prompt or 0, context or card.context_length)
        self.args = (said,)


def read_key(file: Path) -> str:
    """The other server's key, in a file. Raises UserError."""
    try:
        key = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"The key file {file} cannot be read: {e}.") from e
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"The key file {file} holds no key: one line of ASCII letters, digits and signs.")
    return key


def _checked(base_url: str) -> Any:
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, good = None, False
    if parts is None or not good or parts.query or parts.fragment:
        raise UserError("--base-url is no address of a server. Write it as http://127.0.0.1:11434/v1.")
    if parts.username or parts.password:
        raise UserError("--base-url holds a password, which others can read there. Give a key by --upstream-key-file.")
    return parts
