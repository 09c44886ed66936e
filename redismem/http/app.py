"""Builds the ASGI application: gate, L1, admission, routing on the raw path, errors as JSON."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from redismem.errors import RedisMemError
from redismem.http.admitted import Admitted
from redismem.http.docs import docs_page
from redismem.http.gate import Gate
from redismem.http.hot import HotPath
from redismem.http.once import KEY_HEADER, REPLAYED_HEADER
from redismem.http.openapi import openapi_document
from redismem.http.operation import Access, Matcher, guarded
from redismem.http.operator import metrics
from redismem.http.pages import page_headers, page_routes
from redismem.http.table import OPERATIONS
from redismem.http.wire import GENERATION_HEADER, error_response, failure_response, json_response
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.spans import Spans


class RawPath:
    """Routes on the percent-encoded path, so that a user id may hold slashes and percent signs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("raw_path"):
            scope = {**scope, "path": scope["raw_path"].partition(b"?")[0].decode("latin-1")}
        await self._app(scope, receive, send)


async def _failure(request: Request, exc: Exception) -> Response:
    return failure_response(exc, request.method, request.state.request_id)


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    error = RedisMemError(
        f"there is no {request.url.path}; see /docs" if exc.status_code == 404 else exc.detail
    )
    error.status, error.code = exc.status_code, exc.detail.lower().replace(" ", "_")
    response = error_response(error, request.state.request_id)
    response.headers.update(exc.headers or {})
    if exc.status_code == 405:  # starlette names the methods of the first route of the path only
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        response.headers["Allow"] = ", ".join(sorted({name for route in routes for name in route.methods}))
    return response


@cache
def _documentation() -> tuple[dict[str, Any], str]:
    """Return the OpenAPI document and its page."""
    document = openapi_document(OPERATIONS)
    return document, docs_page(document)


def create_app(service: Service | None = None, settings: Settings | None = None) -> ASGIApp:
    """Return the application of an open service, or of one that it opens at startup from settings."""
    settings = service.settings if service else settings or Settings.from_environment()
    spans = Spans.installed()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if service is not None:
            yield
            return
        async with open_service(settings) as opened, opened.kept_up():
            app.state.service = opened
            # what is there now stays: to look through it takes the loop 80 ms at each full collection
            gc.collect()
            gc.freeze()
            try:
                yield
            finally:
                if spans is not None:  # uvicorn's workers end by a signal, without atexit
                    await asyncio.to_thread(spans.close)

    document, page = _documentation()

    async def openapi(request: Request) -> Response:
        dim = request.app.state.service.embedder.dim
        document["components"]["schemas"]["SearchRequest"]["properties"]["vector"] |= {
            "minItems": dim,
            "maxItems": dim,
        }
        return json_response(document)

    async def docs(request: Request) -> Response:
        headers = page_headers(style="'unsafe-inline'", script="'none'")
        return Response(page, headers=headers, media_type="text/html")

    routes = [Route(item.path, guarded(item), methods=[item.method]) for item in OPERATIONS]
    pages = [Route("/openapi.json", openapi), Route("/docs", docs), *page_routes()]
    routes += [Route("/metrics", metrics), *pages]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={RedisMemError: _failure, HTTPException: _http_error, Exception: _failure},
    )
    app.router.redirect_slashes = False
    if service is not None:
        app.state.service = service
    told: list[tuple[str, str, str, Access]] = [
        (item.method, item.path, item.name, item.access) for item in OPERATIONS
    ]
    told.append(("GET", "/metrics", "metrics", "admin"))
    told += [("GET", route.path, "page", "open") for route in pages]
    gate = Gate(HotPath(Admitted(RawPath(app), app), app), app, Matcher(told), settings, spans)
    if not settings.origins:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=settings.origins,
        allow_methods=("GET", "POST", "PATCH", "DELETE"),
        allow_headers=("Authorization", "Content-Type", KEY_HEADER, "If-Match", "X-API-Key", "X-Request-ID"),
        expose_headers=("ETag", GENERATION_HEADER, REPLAYED_HEADER, "Retry-After", "X-Request-ID"),
    )


def worker_app() -> ASGIApp:
    """Return the application of one uvicorn worker, set up by the environment; it ends with its parent."""
    end_with_parent()
    return create_app()


def end_with_parent() -> None:
    """Let this process get a SIGTERM when the one that started it is gone."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    signal.raise_signal(signal.SIGTERM)
