"""What one request did and how long it took, collected on its way through the layers.

Whoever waits for something slow tells the trace of the request it belongs to, if there is one; tasks that a
request starts belong to it. What a request joined (a computation of another) is told by whoever began it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["redis", "embed", "barrier"]

#: whence a read was answered; `none`: nothing is cached of this kind
CacheStatus = Literal["l1", "l2", "l3", "none"]


@dataclass(slots=True, eq=False)
class Trace:
    """One request. Times are `time.perf_counter()` seconds."""

    operation: str
    request_id: str
    began_s: float = field(default_factory=time.perf_counter)
    cache_status: CacheStatus = "none"
    #: too much was asked at once
    is_refused: bool = False
    #: commands or pipelines that were sent to Redis and waited for
    round_trips: int = 0
    #: seconds by part; what runs side by side counts twice
    spent_s: dict[Part, float] = field(default_factory=dict)
    #: seconds from the begin until each stage of a context was handed over
    stages_s: list[float] = field(default_factory=list)
    #: part, begin and end of each wait, kept for OpenTelemetry only
    spans: list[tuple[Part, float, float]] | None = None

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
