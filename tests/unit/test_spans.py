"""Spans as a collector of OpenTelemetry receives them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from redismem.spans import Spans
from redismem.trace import Trace

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

ROOT = Path(__file__).parents[2]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_WAIT_S = 20


class Collector(ThreadingHTTPServer):
    """Receives what is exported to /v1/traces."""

    daemon_threads = True

    def __init__(self) -> None:
        self.exports: list[bytes] = []
        self.arrived = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[Any]:
        """Return every span received, and check whose they are."""
        found = []
        for export in list(self.exports):
            for resource in ExportTraceServiceRequest.FromString(export).resource_spans:
                names = {item.key: item.value.string_value for item in resource.resource.attributes}
                assert names["service.name"] == "redismem"
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found

    def wait(self, count: int) -> list[Any]:
        """Return the spans once there are so many."""
        end_s = time.monotonic() + _WAIT_S
        while len(self.spans()) < count:
            assert time.monotonic() < end_s, "no spans arrived"
            self.arrived.wait(0.1)
            self.arrived.clear()
        return self.spans()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:  # the name of its base
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.server.exports.append(body)
        self.server.arrived.set()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()
    collector.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the environment names; what is recorded arrives soon."""
    with collecting() as one:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", one.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield one


@pytest.fixture
def spans(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """What records to the collector; its threads end with the test."""
    providers: list[TracerProvider] = []

    class Known(TracerProvider):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            providers.append(self)

    monkeypatch.setattr("opentelemetry.sdk.trace.TracerProvider", Known)
    made = Spans.installed()
    assert made is not None
    yield made
    for provider in providers:
        provider.shutdown()


def traced(operation: str = "search") -> Trace:
    """Return the trace of a request with two waits."""
    trace = Trace(operation, "r1", spans=[])
    began_s = trace.began_s
    trace.spans = [("redis", began_s + 0.001, began_s + 0.002), ("embed", began_s + 0.002, began_s + 0.01)]
    trace.cache_status, trace.round_trips = "l3", 1
    return trace


def attributes(span: Any) -> dict[str, object]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_a_request_is_a_span_of_its_callers_trace_and_its_waits_are_below(
    spans: Spans, collector: Collector
) -> None:
    before_ns, trace = time.time_ns(), traced()
    time.sleep(0.02)
    header = b"traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01".encode()
    spans.record(trace, "POST", 200, [(b"content-type", b"application/json"), header])
    after_ns = time.time_ns()
    found = {span.name: span for span in collector.wait(3)}
    assert set(found) == {"search", "redis", "embed"}
    request = found["search"]
    assert {span.trace_id.hex() for span in found.values()} == {TRACE_ID}
    assert request.parent_span_id.hex() == PARENT_ID
    assert request.kind == request.SPAN_KIND_SERVER
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "redismem.operation": "search",
        "redismem.cache_status": "l3",
        "redismem.round_trips": 1,
        "redismem.request_id": "r1",
    }
    for part, took_ms in (("redis", 1), ("embed", 8)):
        span = found[part]
        assert span.parent_span_id == request.span_id
        assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 == pytest.approx(took_ms, abs=0.1)
        assert request.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    slack_ns = 50_000_000  # the two clocks are read one after the other
    assert before_ns - slack_ns <= request.start_time_unix_nano
    assert before_ns + 20_000_000 <= request.end_time_unix_nano <= after_ns + slack_ns


@pytest.mark.parametrize(
    "header", [None, b"rubbish", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"\xff"]
)
def test_without_a_callers_trace_a_request_begins_one(
    spans: Spans, collector: Collector, header: bytes | None
) -> None:
    spans.record(traced(), "GET", 200, [] if header is None else [(b"traceparent", header)])
    found = collector.wait(3)
    (request,) = [span for span in found if span.name == "search"]
    assert request.parent_span_id == b""
    assert len({span.trace_id for span in found}) == 1


def test_a_caller_that_does_not_sample_gets_no_spans(spans: Spans, collector: Collector) -> None:
    unwanted = [(b"traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00".encode())]
    spans.record(traced("get"), "GET", 200, unwanted)
    spans.record(traced("list"), "GET", 200, [])
    assert {span.name for span in collector.wait(3)} == {"list", "redis", "embed"}


def test_only_what_failed_on_our_side_is_an_error(spans: Spans, collector: Collector) -> None:
    for status, name in ((404, "get"), (503, "list"), (500, "search"), (0, "put")):
        spans.record(traced(name), "GET", status, [])
    found = {span.name: span for span in collector.wait(12)}
    errors = {name for name in ("get", "list", "search", "put") if found[name].status.code == 2}
    assert errors == {"list", "search"}


def test_a_collector_that_is_away_slows_nothing(spans: Spans, collector: Collector) -> None:
    collector.shutdown()
    collector.server_close()
    began_s = time.monotonic()
    for _ in range(100):
        spans.record(traced(), "GET", 200, [])
    assert time.monotonic() - began_s < 1


LOADED = """
import sys
from redismem.http.app import create_app
from redismem.settings import Settings
app = create_app(settings=Settings(embedder="deterministic", testing=True))
print(app._spans is not None, any(name.startswith("opentelemetry.exporter") for name in sys.modules))
"""


@pytest.mark.parametrize(("endpoint", "told"), [("http://127.0.0.1:9", "True True"), ("", "False False")])
def test_without_a_collector_no_exporter_is_loaded(endpoint: str, told: str) -> None:
    """redis-py 8 imports what it finds of the SDK by itself."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environ |= {"PYTHONPATH": str(ROOT), "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    done = subprocess.run(
        [sys.executable, "-c", LOADED], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == told.split()


MISSING = """
import sys
sys.modules["opentelemetry.exporter"] = None
import logging
logging.basicConfig(format="%(message)s")
from redismem.spans import Spans
print(Spans.installed())
"""


def test_where_the_packages_are_missing_it_says_what_to_install(collector: Collector) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MISSING], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "None"
    assert done.stderr.strip() == "no traces: pip install 'redismem[otel]'"
