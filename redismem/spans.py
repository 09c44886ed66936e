"""The only place that speaks to OpenTelemetry: a span for each request, and one for each of its waits.

Nothing happens unless the standard variable OTEL_EXPORTER_OTLP_ENDPOINT names a collector. Spans are made
when a request has ended, from its trace, so that tracing costs the read path no more than noting times.
Attributes hold no text and no user.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from redismem.trace import Trace

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

_NS = 1_000_000_000


class Spans:
    """Records traces of requests as spans.

    Args:
        tracer: of an OpenTelemetry provider.
        close: ends the provider, and sends what it still holds.
    """

    def __init__(self, tracer: Tracer, close: Callable[[], object] = lambda: None) -> None:
        from opentelemetry import propagate, trace  # noqa: PLC0415  # an optional package

        self._tracer = tracer
        #: sends what waits
        self.close = close
        self._propagate, self._api = propagate, trace

    @classmethod
    def installed(cls) -> Spans | None:
        """Return what records; None without a collector, or without the packages."""
        if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415  # optional
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError:
            logger.warning("no traces: pip install 'redismem[otel]'")
            return None
        name = os.environ.get("OTEL_SERVICE_NAME", "redismem")
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider.get_tracer("redismem"), provider.shutdown)

    def record(self, trace: Trace, method: str, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Make the spans of a request that has just ended; its caller's trace goes on in them."""
        ended_ns = time.time_ns()
        offset_ns = ended_ns - int(time.perf_counter() * _NS)

        def at(seconds: float) -> int:
            return offset_ns + int(seconds * _NS)

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.response.status_code": status,
            "redismem.operation": trace.operation,
            "redismem.cache_status": trace.cache_status,
            "redismem.round_trips": trace.round_trips,
            "redismem.request_id": trace.request_id,
        }
        span = self._tracer.start_span(
            trace.operation,
            context=self._propagate.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            start_time=at(trace.began_s),
        )
        if status >= 500:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR))
        within = self._api.set_span_in_context(span)
        for part, began_s, end_s in trace.spans or ():
            child = self._tracer.start_span(part, context=within, start_time=at(began_s))
            child.end(at(end_s))
        span.end(ended_ns)
