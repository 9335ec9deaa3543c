"""The API that front-ends of Petals speak: a WebSocket with one session for each connection, and three HTTP paths.

Knows messages, parameters and the form of errors here; sessions and answers are in petals_sessions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, WebSocket
from fastapi.params import Depends
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect, WebSocketState

from petals_win.api import reply_schemas as sent
from petals_win.api.answering import unless_disconnected
from petals_win.api.ascii_json import AsciiJson
from petals_win.api.errors import ApiError, from_engine
from petals_win.api.generations import Generations
from petals_win.api.petals_sessions import IDLE_S, Generate, Session, Sessions, portions
from petals_win.api.schemas import Text
from petals_win.api.streaming import SEND_S, until_one_ends
from petals_win.engines.base import Engine
from petals_win.errors import UserError

FIRST_MESSAGE_S = 60.0
_AHEAD = 4  # messages that may come while an answer is given
_POLICY = 1008  # of the ways to close a WebSocket
_FORM = "application/x-www-form-urlencoded"


class OpenSession(BaseModel):
    """The first message of a connection."""

    model: Text
    max_length: int


class GenerateOverHttp(Generate):
    """Fields of a form, or of the query."""

    model: Annotated[Text | None, Field(description="needed without a session")] = None
    session_id: Annotated[Text | None, Field(description="left out: a text of its own")] = None


class Generated(BaseModel):
    ok: Literal[True] = True
    outputs: str = Field(description="only what is new")


class Opened(BaseModel):
    ok: Literal[True] = True
    session_id: str


class Closed(BaseModel):
    ok: Literal[True] = True


class Refused(BaseModel):
    """What is wrong, in a sentence."""

    ok: Literal[False] = False
    traceback: str


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    said = {400: "It cannot be answered.", 404: "No such model or session.", 409: "The session is busy."}
    said |= {415: "The body is no form.", 429: "Too many requests or sessions.", 500: "An error.", 503: "Not now."}
    ours = {status: {"model": Refused, "description": said[status]} for status in statuses}
    return sent.errors(401, 403, 408, 413) | ours


def _query(name: str, kind: str) -> dict[str, Any]:
    """A parameter that we read by ourselves, since what is wrong with it is told in the form of these routes."""
    return {"name": name, "in": "query", "required": True, "schema": {"type": kind}}


def petals_routes(engine: Engine, generations: Generations, http_dependencies: Sequence[Depends]) -> APIRouter:
    """What needs a key, where keys are set. The dependencies are of HTTP's routes alone: they know no WebSockets."""
    router, over_http = APIRouter(), APIRouter(dependencies=http_dependencies)
    sessions = Sessions(engine)

    @router.websocket("/api/v2/generate")
    async def chat(connection: WebSocket) -> None:
        await connection.accept()
        await _Chat(connection, engine, generations, sessions).run()

    @over_http.post(
        "/api/v1/generate",
        response_model=Generated,
        responses=_errors(400, 404, 409, 415, 429, 500, 503),
        openapi_extra={"requestBody": {"content": {_FORM: {"schema": GenerateOverHttp.model_json_schema()}}}},
    )
    async def generate(http: Request) -> Response:
        """Continue a text, or with a session_id the text of a session."""

        async def answer() -> Generated:
            asked = GenerateOverHttp.model_validate(await _fields(http))
            if asked.stop_sequence or asked.extra_stop_sequences:
                raise ApiError(400, "stop_sequence: only the WebSocket /api/v2/generate knows it.")
            if asked.session_id:
                session = sessions.find(asked.session_id)
            elif asked.model:
                session = sessions.new(asked.model, None)
            else:
                raise ApiError(400, "model: the name of a model is needed; /v1/models tells those that there are.")
            async with contextlib.aclosing(portions(engine, generations, session, asked)) as parts:
                return Generated(outputs="".join([part.outputs async for part in parts]))

        return await _told(unless_disconnected(http, answer()))

    @over_http.get(
        "/api/v1/open_inference_session",
        response_model=Opened,
        responses=_errors(400, 404, 429, 500, 503),
        openapi_extra={"parameters": [_query("model", "string"), _query("max_length", "integer")]},
    )
    async def open_session(http: Request) -> Response:
        """Begin a chat of at most so many tokens."""

        async def opened() -> Opened:
            _check_page(http)
            asked = OpenSession.model_validate(await _fields(http))
            return Opened(session_id=sessions.open(asked.model, asked.max_length).id)

        return await _told(opened())

    @over_http.get("/api/v1/close_inference_session", response_model=Closed, responses=_errors(400))
    async def close_session(http: Request, session_id: str = "") -> Response:
        """End a chat; one that is not open is none the worse for it."""

        async def closed() -> Closed:
            _check_page(http)
            sessions.close(session_id)
            return Closed()

        return await _told(closed())

    router.include_router(over_http)
    return router


class _Chat:
    """One connection. It is read while an answer is given, so that the answer ends with it."""

    def __init__(self, connection: WebSocket, engine: Engine, generations: Generations, sessions: Sessions):
        self._connection = connection
        self._engine, self._generations, self._sessions = engine, generations, sessions
        self._session: Session | None = None
        self._inbox: asyncio.Queue[str | bytes] = asyncio.Queue(_AHEAD)

    async def run(self) -> None:
        try:
            await until_one_ends(self._read(), self._talk())
        except WebSocketDisconnect:
            pass
        finally:
            if self._session is not None:
                self._sessions.close(self._session.id)
        if self._connection.client_state is WebSocketState.CONNECTED:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it may be closed by now
                await self._connection.close(_POLICY)

    async def _read(self) -> None:
        """Returns when the client has left, or sends more than it waits for."""
        while (message := await self._connection.receive())["type"] != "websocket.disconnect":
            if self._inbox.full():
                await self._send(Refused(traceback="Wait for the answer before you send more."))
                return
            self._inbox.put_nowait(message.get("text") or message.get("bytes") or "")

    async def _talk(self) -> None:
        """Returns when nothing has come for too long."""
        while True:
            patience = FIRST_MESSAGE_S if self._session is None else IDLE_S
            try:
                message = await asyncio.wait_for(self._inbox.get(), patience)
            except TimeoutError:
                return await self._send(Refused(traceback=f"Nothing was asked for {patience:.0f} s, so this ends."))
            try:
                await self._answer(_parsed(message))
            except (ApiError, UserError, ValidationError) as error:
                await self._send(Refused(traceback=str(_as_api_error(error))))

    async def _answer(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "open_inference_session" if self._session is not None:
                raise ApiError(400, "This connection has a session already. Open another connection for another one.")
            case "open_inference_session":
                asked = OpenSession.model_validate(message)
                self._session = self._sessions.open(asked.model, asked.max_length)
                await self._send(Closed())
            case "generate":
                if self._session is None:
                    raise ApiError(400, "Send a message of type open_inference_session first.")
                asked = Generate.model_validate(message)
                parts = portions(self._engine, self._generations, self._session, asked)
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        await self._send({"ok": True, **vars(part)})
            case _:
                raise ApiError(400, "type: open_inference_session or generate is needed.")

    async def _send(self, body: BaseModel | dict[str, Any]) -> None:
        """Raises WebSocketDisconnect if the client has left or does not read."""
        body = body.model_dump() if isinstance(body, BaseModel) else body
        try:
            await asyncio.wait_for(self._connection.send_text(json.dumps(body)), SEND_S)
        except (TimeoutError, RuntimeError) as e:  # the latter: closed meanwhile
            raise WebSocketDisconnect(_POLICY) from e


def _parsed(message: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(message)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiError(400, "A message has to be a JSON object.")
    return {name: value for name, value in parsed.items() if value is not None}


async def _fields(http: Request) -> dict[str, str]:
    """Those of the query and of the form in the body; empty ones count as left out."""
    body = await http.body()
    if body and http.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise ApiError(415, f"Send the parameters as a form (Content-Type: {_FORM}) or in the query.")
    try:
        form = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as e:
        raise ApiError(400, "The form is not UTF-8 text, or has more than 100 fields.") from e
    return {name: value for name, value in [*http.query_params.items(), *form] if value}


async def _told(work: Coroutine[Any, Any, BaseModel]) -> Response:
    """What the work returns, or what is wrong, in the form that these clients know."""
    try:
        return AsciiJson((await work).model_dump())
    except (ApiError, UserError, ValidationError) as caught:
        error = _as_api_error(caught)
        return AsciiJson(Refused(traceback=str(error)).model_dump(), error.status, error.headers)


def _as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case UserError():
            return from_engine(error)
        case ValidationError():
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            return ApiError(400, f"{where}: {reason[:1].lower()}{reason[1:]}.", param=where)
    raise error


def _check_page(http: Request) -> None:
    """What a GET does is not for foreign pages, which can send one without saying who they are."""
    site = http.headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") and "origin" not in http.headers:
        raise ApiError(403, "Pages of other sites may not do this.")
