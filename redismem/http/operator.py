"""What an operator asks a process: whether it lives, what it does, how the promises stand."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from redismem.errors import Unavailable
from redismem.http.routes import service_of
from redismem.http.wire import json_response
from redismem.metrics import CONTENT_TYPE
from redismem.warm import Warmth


class Health(Struct, kw_only=True, omit_defaults=True):
    """Whether the process runs (live), or can serve (ready): then also how many of the users are warm."""

    status: str
    reason: str | None = None
    warm: Warmth | None = None


async def stats(request: Request) -> Response:
    """Tell what this process's caches hold and did, since its start, and what maintenance found."""
    return json_response(await service_of(request).stats())


async def live(request: Request) -> Response:
    """Tell that the process runs."""
    return json_response(Health(status="ok"))


async def ready(request: Request) -> Response:
    """Tell whether the process can serve: 503 while Redis is away or the most active users are not warm."""
    service = service_of(request)
    try:
        await service.ping()
    except Unavailable as exc:
        headers = {"Retry-After": str(exc.retry_after_s)}
        return json_response(Health(status="unavailable", reason=exc.message), 503, headers)
    warm = service.warmer.warmth
    if not service.warmer.is_ready:
        return json_response(Health(status="warming", warm=warm), 503, {"Retry-After": "1"})
    return json_response(Health(status="ok", warm=warm))


async def slo(request: Request) -> Response:
    """Tell how each promise stands, and what is left of its budget."""
    return json_response(await service_of(request).overview.slo())


async def dashboard(request: Request) -> Response:
    """Tell everything the dashboard shows."""
    return json_response(await service_of(request).overview.dashboard())


async def metrics(request: Request) -> Response:
    """Tell the metrics of all processes of this service, for Prometheus."""
    service = service_of(request)
    service.telemetry.sample()
    return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
