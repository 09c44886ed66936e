"""What one request did and how long it took, collected on its way through the layers.

Whoever waits for something slow tells the trace of the request it belongs to, if there is one; tasks that a
request starts belong to it. What a request joined (a computation of another) is told by whoever began it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Part = Literal["redis", "embed", "barrier"]

#: whence a read was answered; `none`: nothing is cached of this kind
CacheStatus = Literal["l1", "l2", "l3", "none"]

Span = tuple[Part, float, float]


class Trace:
    """One request. Times are `time.perf_counter()` seconds.

    Attributes:
        operation, request_id: what it is, and its name in logs.
        cache_status: whence a read was answered.
        is_refused: too much was asked at once.
        round_trips: commands or pipelines that were sent to Redis and waited for.
        spent_s: seconds by part; what runs side by side counts twice.
        stages_s: number, and seconds from the begin until it was handed over, of each stage of a context.
        spans: part, begin and end of each wait; kept for OpenTelemetry only, else None.
    """

    __slots__ = (
        *("began_s", "cache_status", "is_refused", "operation", "request_id"),
        *("round_trips", "spans", "spent_s", "stages_s"),
    )

    def __init__(self, operation: str, request_id: str, *, spans: list[Span] | None = None) -> None:
        self.operation = operation
        self.request_id = request_id
        self.spans = spans
        self.began_s = time.perf_counter()
        self.cache_status: CacheStatus = "none"
        self.is_refused = False
        self.round_trips = 0
        self.spent_s: dict[Part, float] = {}
        self.stages_s: list[tuple[int, float]] = []

    def add(self, part: Part, began_s: float) -> None:
        """Count what began then and ends now."""
        now_s = time.perf_counter()
        self.spent_s[part] = self.spent_s.get(part, 0.0) + now_s - began_s
        if self.spans is not None:
            self.spans.append((part, began_s, now_s))

    def split_ms(self) -> dict[str, float]:
        """Return the milliseconds of each part so far, and of all."""
        parts = {f"{part}_ms": round(1000 * spent, 1) for part, spent in self.spent_s.items()}
        return {"total_ms": round(1000 * (time.perf_counter() - self.began_s), 1), **parts}


current: ContextVar[Trace | None] = ContextVar("redismem_trace", default=None)


@contextmanager
def waiting(part: Part) -> Iterator[None]:
    """Count the time of the block for the request that runs, if one does."""
    trace = current.get()
    if trace is None:
        yield
        return
    began_s = time.perf_counter()
    try:
        yield
    finally:
        trace.add(part, began_s)
