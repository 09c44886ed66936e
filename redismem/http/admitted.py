"""Lets requests in, or refuses them, where L1 could not answer: what costs more than refusing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redismem.errors import Overloaded
from redismem.http.wire import failure_response
from redismem.service import Service
from redismem.slo import GROUPS
from redismem.trace import current

#: how many times as long as a read the requests of a group may take; others tell nothing about the load
_PATIENCE: Mapping[str | None, float] = {"retrieval": 1.0, "context": 2.0}


@asynccontextmanager
async def admitted(service: Service, operation: str) -> AsyncIterator[None]:
    """Work on a request in the block.

    Raises:
        Overloaded: too many are being worked on.
    """
    began_s = _enter(service)
    took_s = None
    try:
        yield
        took_s = _judged_s(operation, began_s)
    finally:
        service.admission.leave(took_s)


def _enter(service: Service) -> float:
    if not service.admission.enter():
        if (trace := current.get()) is not None:
            trace.is_refused = True
        service.metrics.count("redismem_refused", "overload")
        raise Overloaded("too much is asked at once: try again later, and less at a time")
    return time.perf_counter()


def _judged_s(operation: str, began_s: float) -> float | None:
    patience = _PATIENCE.get(GROUPS.get(operation))
    return None if patience is None else (time.perf_counter() - began_s) / patience


class Admitted:
    """Wraps the application: a request is let in until its reply begins. Pages and probes always are."""

    def __init__(self, inner: ASGIApp, app: Starlette) -> None:
        self._inner = inner
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trace = current.get()
        if scope["type"] != "http" or trace is None or trace.operation not in GROUPS:
            await self._inner(scope, receive, send)
            return
        service: Service = self._app.state.service
        try:
            began_s = _enter(service)
        except Overloaded as exc:
            await failure_response(exc, scope["method"], trace.request_id)(scope, receive, send)
            return
        is_inside = True

        async def watched(message: Message) -> None:
            nonlocal is_inside
            if message["type"] == "http.response.start":
                # a stream is as long as its reader is slow
                is_inside = False
                is_told = message["status"] < 300
                service.admission.leave(_judged_s(trace.operation, began_s) if is_told else None)
            await send(message)

        try:
            await self._inner(scope, receive, watched)
        finally:
            if is_inside:
                service.admission.leave(None)
