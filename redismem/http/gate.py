"""The first and last thing a request meets: its id, its key, the limits, and the counting of how it ended.

Around it only CORS; behind it L1 and the application. Whoever may not ask is refused here, so that nothing
further in decides about it again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redismem.apikeys import ApiKey, KeyTable
from redismem.errors import (
    DeadlineExceeded,
    Forbidden,
    RateLimited,
    RedisMemError,
    RedisUnavailable,
    Unauthorized,
)
from redismem.http.conversations import STREAM
from redismem.http.deadlines import Deadlines
from redismem.http.operation import USERS, Access, Matcher, Told
from redismem.http.wire import failure_response, request_id_of
from redismem.metrics import Metrics
from redismem.service import Service
from redismem.settings import Settings
from redismem.slo import GROUPS
from redismem.spans import Spans
from redismem.trace import Trace, current

logger = logging.getLogger(__name__)

#: what may take long, because it is as long as what it is given
_LONG = ("import", "forget", "export")

_NOSNIFF = (b"x-content-type-options", b"nosniff")

_NO_KEY = "a valid API key is required"
_NOT_ALLOWED = "this API key does not allow that"


class Gate:
    """Wraps the application; `app` is where the service is found."""

    def __init__(
        self, inner: ASGIApp, app: Starlette, matcher: Matcher, settings: Settings, spans: Spans | None
    ) -> None:
        self._inner = inner
        self._app = app
        self._matcher = matcher
        #: a store without API keys is served to everybody
        self._may_be_open = settings.may_be_open
        self._slow_s = settings.slow_request_ms / 1000 or math.inf
        self._access_log = settings.access_log
        self._limit_s = settings.request_timeout_s
        self._deadlines = Deadlines()
        self._spans = spans
        #: since the first request: the framework's way to it costs as much as a look into L1
        self._service: Service | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serve = self._serve if scope["type"] == "http" else self._inner
        await serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service or self._found_service()
        path = _path_of(scope)
        told = self._matcher.told(scope["method"], path)
        request_id = request_id_of(scope["headers"])
        trace = Trace(told.name, request_id, spans=None if self._spans is None else [])
        current.set(trace)
        scope.setdefault("state", {})["request_id"] = request_id
        status, tag = 0, (b"x-request-id", request_id.encode())
        deadlines, limit_s = self._deadlines, self._limit_s
        task = None if told.name in _LONG else deadlines.begin(limit_s)

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if task is not None:  # a stream is as long as its reader is slow
                    deadlines.end(task)
                message["headers"] = [*message["headers"], tag, _NOSNIFF]
            await send(message)

        try:
            if told.access != "open":
                await self._check(service, scope, told, path)
            await self._inner(scope, receive, tagged)
        except RedisMemError as exc:  # of the checks: what is further in answers its own
            await failure_response(exc, scope["method"], request_id)(scope, receive, tagged)
        except asyncio.CancelledError:
            if task is None or status or not deadlines.has_ended(task):
                raise
            late = DeadlineExceeded(f"not answered within {limit_s:g} s: ask for less at once")
            await failure_response(late, scope["method"], request_id)(scope, receive, tagged)
        except Exception:
            status = status or 500
            raise
        finally:
            if task is not None:
                deadlines.end(task)
            self._count(service, trace, status, scope)

    def _found_service(self) -> Service:
        service: Service = self._app.state.service
        self._service = service
        return service

    async def _check(self, service: Service, scope: Scope, told: Told, path: bytes) -> None:
        """Let a request pass, with its key in the scope.

        Raises:
            Unauthorized, Forbidden, RateLimited: it may not.
            RedisUnavailable: who asks cannot be told now.
        """
        table = service.keyring.known()
        if table is None:
            table = await self._table(service, told)
        if table.is_empty and self._may_be_open:
            return
        key = table.holder(_token(scope["headers"]))
        if key is None:
            service.metrics.count("redismem_refused", "key")
            raise Unauthorized(_NO_KEY)
        if not (_allows(key, told.access) and _covers(key, path)):
            service.metrics.count("redismem_refused", "scope")
            raise Forbidden(_NOT_ALLOWED)
        scope["state"]["key"] = key
        if not service.limiter.try_take(key) and (wait_s := await service.limiter.take(key)):
            service.metrics.count("redismem_refused", "rate")
            error = RateLimited(f"this API key may ask {key.rate_per_s:g} times a second")
            error.retry_after_s = math.ceil(wait_s)
            raise error

    @staticmethod
    async def _table(service: Service, told: Told) -> KeyTable:
        """Return all keys. Operators may look while Redis is away: then least of all should they be blind."""
        try:
            return await service.keyring.table()
        except RedisUnavailable:
            if told.access != "admin" or service.keyring.last is None:
                raise
            return service.keyring.last

    def _count(self, service: Service, trace: Trace, status: int, scope: Scope) -> None:
        took_s = time.perf_counter() - trace.began_s
        metrics, name = service.metrics, trace.operation
        if trace.stages_s and name == STREAM:  # it is as long as its reader is slow
            took_s = trace.stages_s[-1][1]
        metrics.count("redismem_requests", name, _outcome(status, trace))
        group = GROUPS.get(name)
        if 200 <= status < 300 and group is not None:
            if group == "retrieval":
                metrics.observe("retrieval", took_s, name, trace.cache_status)
            else:
                metrics.observe(group, took_s, name)
            if trace.cache_status != "l1":
                _count_waits(metrics, trace)
        if self._access_log or (took_s >= self._slow_s and name not in _LONG):
            self._log(service, trace, status, took_s)
        if self._spans is not None:
            self._spans.record(trace, scope["method"], status, scope["headers"])

    def _log(self, service: Service, trace: Trace, status: int, took_s: float) -> None:
        is_slow = took_s >= self._slow_s and trace.operation not in _LONG
        if is_slow:
            service.metrics.count("redismem_slow_requests", trace.operation)
        told = {
            "operation": trace.operation,
            "status": status,
            "cache_status": trace.cache_status,
            "round_trips": trace.round_trips,
            **trace.split_ms(),
        }
        if is_slow:
            logger.warning("slow request", extra=told)
        else:
            logger.info("request", extra=told)


def _count_waits(metrics: Metrics, trace: Trace) -> None:
    """Count what a request waited for that L1 did not answer."""
    metrics.observe("trips", trace.round_trips, trace.operation)
    if (embed_s := trace.spent_s.get("embed")) is not None:
        metrics.observe("embedding", embed_s)
    if (barrier_s := trace.spent_s.get("barrier")) is not None:
        metrics.observe("barrier", barrier_s)
    for number, stage_s in trace.stages_s:
        metrics.observe("stage", stage_s, str(number))


def _path_of(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path.partition(b"?")[0] if b"?" in path else path


def _token(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return what a request shows as its API key, Authorization first; empty for nothing."""
    token = b""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("latin-1")
        if name == b"x-api-key":
            token = value.strip()
    return token.decode("latin-1")


def _allows(key: ApiKey, access: Access) -> bool:
    return access == "open" or access == "any" or key.allows(access)  # noqa: PLR1714  # mypy narrows this


def _covers(key: ApiKey, path: bytes) -> bool:
    if not key.users or not path.startswith(USERS):
        return True
    with suppress(UnicodeDecodeError):
        return key.covers(unquote_to_bytes(path[len(USERS) :].partition(b"/")[0]).decode())
    return False


def _outcome(status: int, trace: Trace) -> str:
    if status < 400:
        return "ok" if status else "client"  # it went away before there was anything to tell
    if status == 503 and trace.is_refused:
        return "refused"
    return "client" if status < 500 else "failed"
