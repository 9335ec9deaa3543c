"""The FastAPI application: puts guards, routes and pages together. Knows no engine in particular."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from petals_win import __version__
from petals_win.api import errors, reply_schemas
from petals_win.api.anthropic_routes import anthropic_routes
from petals_win.api.ascii_json import AsciiJson
from petals_win.api.blanks import BlanksAhead
from petals_win.api.embedding import embedding_routes
from petals_win.api.generations import Generations
from petals_win.api.guards import Cors, LimitBody, LimitHead, RequireKey, TrustedPages
from petals_win.api.metrics import metrics_routes
from petals_win.api.names import with_names
from petals_win.api.ollama_routes import ollama_routes
from petals_win.api.petals_chat import petals_routes
from petals_win.api.proxies import Forwarded, Prefix
from petals_win.api.responses_routes import responses_routes
from petals_win.api.routes import engine_routes, open_routes
from petals_win.api.settings import Settings
from petals_win.api.swarm import swarm_routes
from petals_win.api.tokenizing import tokenizing_routes
from petals_win.engines.base import Engine, Loads
from petals_win.errors import UserError
from petals_win.web import pages

_OPEN_PATHS = pages.PATHS | {"/health", "/openapi.json"}


def create_app(engine: Engine, *, settings: Settings) -> FastAPI:
    """The API in front of `engine`, which the app closes when it shuts down.

    `app.state.generations` runs the answers; a server calls its `stop()` before it waits for open connections.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(
        title="petals-win",
        summary="OpenAI's API, answered by a swarm of PCs",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        default_response_class=AsciiJson,
        lifespan=lifespan,
    )
    loads = engine if isinstance(engine, Loads) else None
    engine = with_names(engine, settings.aliases, settings.any_model)
    generations = Generations(engine, settings.max_running, settings.max_waiting, loads)
    app.state.generations = generations

    app.include_router(open_routes())
    # RequireKey does the checking; the dependency makes /docs offer a field for the key.
    shown_in_docs = [Depends(HTTPBearer(auto_error=False))] if settings.needs_key else []
    app.include_router(engine_routes(engine, generations), dependencies=shown_in_docs)
    app.include_router(swarm_routes(engine, generations), dependencies=shown_in_docs)
    app.include_router(metrics_routes(engine, generations), dependencies=shown_in_docs)
    app.include_router(ollama_routes(engine, generations, loads), dependencies=shown_in_docs)
    app.include_router(anthropic_routes(engine, generations), dependencies=shown_in_docs)
    app.include_router(petals_routes(engine, generations, shown_in_docs))
    app.include_router(responses_routes(engine, generations), dependencies=shown_in_docs)
    app.include_router(tokenizing_routes(engine), dependencies=shown_in_docs)
    app.include_router(embedding_routes(engine, generations), dependencies=shown_in_docs)
    app.include_router(pages.page_routes())

    app.add_exception_handler(errors.ApiError, errors.on_api_error)
    app.add_exception_handler(UserError, errors.on_user_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid_request)
    app.add_exception_handler(ClientDisconnect, errors.on_disconnect)
    app.add_exception_handler(Exception, errors.on_defect)

    describe = app.openapi
    app.openapi = functools.cache(lambda: reply_schemas.complete(describe()))

    # The last one added is the first one asked.
    if settings.blanks_ahead:
        app.add_middleware(BlanksAhead)
    app.add_middleware(LimitBody, settings=settings)
    app.add_middleware(RequireKey, settings=settings, open_paths=_OPEN_PATHS)
    app.add_middleware(
        Cors,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("Retry-After", "WWW-Authenticate"),
    )
    app.add_middleware(TrustedPages, settings=settings)
    app.add_middleware(LimitHead)
    if settings.root_path:
        app.add_middleware(Prefix, prefix=settings.root_path)
    if settings.trusted_proxies:
        app.add_middleware(Forwarded, settings=settings)
    return app
