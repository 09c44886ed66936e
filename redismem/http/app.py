"""Builds the ASGI application: routing on the raw path, request ids, errors as JSON."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redismem.errors import RedisMemError
from redismem.http.docs import docs_page
from redismem.http.hot import HotPath
from redismem.http.openapi import openapi_document
from redismem.http.table import OPERATIONS, guarded
from redismem.http.wire import error_response, failure_response, json_response, request_id_of
from redismem.service import Service, open_service
from redismem.settings import Settings


class RawPath:
    """Routes on the percent-encoded path, so that a user id may hold slashes and percent signs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("raw_path"):
            scope = {**scope, "path": scope["raw_path"].partition(b"?")[0].decode("latin-1")}
        await self._app(scope, receive, send)


class RequestId:
    """Takes X-Request-ID from the caller or makes one, and returns it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, tagged)


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


def create_app(service: Service | None = None, settings: Settings | None = None) -> ASGIApp:
    """Return the application of an open service, or of one that it opens at startup from settings."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if service is not None:
            yield
            return
        async with open_service(settings or Settings.from_environment()) as opened, opened.kept_up():
            app.state.service = opened
            yield

    document = openapi_document(OPERATIONS)
    page = docs_page(document)

    async def openapi(request: Request) -> Response:
        dim = request.app.state.service.embedder.dim
        document["components"]["schemas"]["SearchRequest"]["properties"]["vector"] |= {
            "minItems": dim,
            "maxItems": dim,
        }
        return json_response(document)

    async def docs(request: Request) -> Response:
        return Response(page, media_type="text/html")

    routes = [Route(item.path, guarded(item), methods=[item.method]) for item in OPERATIONS]
    routes += [Route("/openapi.json", openapi), Route("/docs", docs)]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={RedisMemError: _failure, HTTPException: _http_error, Exception: _failure},
    )
    app.router.redirect_slashes = False
    if service is not None:
        app.state.service = service
    return HotPath(RequestId(RawPath(app)), app)


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
