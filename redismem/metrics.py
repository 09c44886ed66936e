"""The only place that names Prometheus metrics, and that talks to prometheus_client.

Requests count into plain lists; once a second, and before each scrape, these move into prometheus_client:
with several processes each of its observations costs 4 us, against 40 us of a whole answer from L1.
Labels are bounded sets: operations, tiers, kinds and signals, never users.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import add
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from redismem.slo import BOUNDS_MS

CONTENT_TYPE = CONTENT_TYPE_LATEST

#: where processes of one `serve` share what they count; prometheus_client reads it
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_FINE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


def _seconds(group: str) -> tuple[float, ...]:
    return tuple(bound / 1000 for bound in BOUNDS_MS[group])


HistogramName = Literal[
    "retrieval", "context", "stage", "update", "embedding", "barrier", "lag", "trips", "job"
]

#: Prometheus name, what it tells, labels, upper bounds
_HISTOGRAMS: Mapping[HistogramName, tuple[str, str, tuple[str, ...], tuple[float, ...]]] = {
    "retrieval": (
        "memory_retrieval_seconds",
        "Reads that were answered, from the headers of the request to the last byte of the reply",
        ("operation", "cache_status"),
        _seconds("retrieval"),
    ),
    "context": (
        "redismem_context_seconds",
        "Contexts that were answered, whole",
        ("operation",),
        _seconds("context"),
    ),
    "stage": (
        "redismem_context_stage_seconds",
        "From the begin of a request until a stage of its context was handed over",
        ("stage",),
        _seconds("context"),
    ),
    "update": (
        "redismem_update_seconds",
        "Writes that were acknowledged",
        ("operation",),
        _seconds("update"),
    ),
    "embedding": ("redismem_embedding_seconds", "Waits of a request for embeddings", (), _FINE_S),
    "barrier": ("redismem_barrier_seconds", "Waits of a strong write for every process", (), _FINE_S),
    "lag": (
        "redismem_event_loop_lag_seconds",
        "How much later than asked the event loop woke a task",
        (),
        (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    ),
    "trips": (
        "redismem_redis_round_trips",
        "Round trips to Redis of a request that L1 did not answer",
        ("operation",),
        (0, 1, 2, 3, 4, 6, 10),
    ),
    "job": ("redismem_job_seconds", "Jobs of the worker", ("kind",), (0.01, 0.1, 1, 10, 60, 600)),
}

#: name without _total, what it tells, labels
_COUNTERS = {
    "redismem_requests": ("Requests by how they ended", ("operation", "outcome")),
    "redismem_refused": ("Requests that were refused", ("reason",)),
    "cache_hits": ("Look-ups that a cache answered", ("cache_type",)),
    "cache_misses": ("Look-ups that it did not", ("cache_type",)),
    "redismem_cache_evictions": ("Entries that left for room", ("cache_type",)),
    "redismem_cache_invalidations": ("Entries that left because something changed", ("cache_type",)),
    "redismem_prefetch": ("Memories loaded before they were asked for", ("signal", "outcome")),
    "redismem_jobs_done": ("Jobs of the worker by how they ended", ("kind", "outcome")),
    "redismem_slow_requests": ("Requests slower than REDISMEM_SLOW_REQUEST_MS", ("operation",)),
}

#: of one process, added up over all that live
_OF_PROCESS = {
    "cache_size_bytes": ("Bytes that a cache holds", ("cache_type",)),
    "redismem_cache_entries": ("Entries that a cache holds", ("cache_type",)),
    "redismem_lease_live": ("Processes whose L1 may answer", ()),
    "redismem_processes": ("Processes that serve", ()),
    "redismem_in_flight": ("Requests that are worked on", ()),
    "redismem_in_flight_limit": ("Requests that may be worked on at once", ()),
}

#: of the store, the same whichever process tells it
_OF_STORE = {
    "index_size_vectors": ("Memories in all indexes, as of the last round of maintenance", ()),
    "index_memory_bytes": ("Bytes of RediSearch's indexes", ()),
    "redismem_users": ("Users with memories, as of the last round of maintenance", ()),
    "redismem_redis_memory_bytes": ("Bytes that Redis uses", ()),
    "redismem_redis_max_memory_bytes": ("Bytes that Redis may use; 0: no limit", ()),
    "redismem_redis_up": ("1 while Redis answers", ()),
    "redismem_jobs": ("Jobs by state", ("state",)),
    "redismem_job_lag_seconds": ("For how long the oldest job that is due has waited", ()),
}


#: counts by bucket, then the sum of the values, by name and labels
Observed = dict[tuple[HistogramName, tuple[str, ...]], list[float]]
#: events by name and labels
Counted = dict[tuple[str, tuple[str, ...]], int]


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._bounds = {name: bounds for name, (_, _, _, bounds) in _HISTOGRAMS.items()}
        self._histograms = {
            name: Histogram(metric, told, labels, buckets=bounds, registry=self._registry)
            for name, (metric, told, labels, bounds) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(name, told, labels, registry=self._registry)
            for name, (told, labels) in _COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(name, told, labels, multiprocess_mode="livesum", registry=self._registry)
            for name, (told, labels) in _OF_PROCESS.items()
        }
        self._gauges |= {
            name: Gauge(name, told, labels, multiprocess_mode="livemostrecent", registry=self._registry)
            for name, (told, labels) in _OF_STORE.items()
        }
        self._gauges["redismem_index_build_seconds"] = Gauge(
            "redismem_index_build_seconds",
            "For how long an index has been built; 0: none is",
            multiprocess_mode="livemax",
            registry=self._registry,
        )
        #: since the last `flush`: counts by bucket, then the sum of the values
        self._observed: Observed = {}
        self._counted: Counted = {}
        #: since the last `taken`
        self._taken: tuple[Observed, Counted] = ({}, {})
        #: totals that others keep, as they were last told
        self._totals: dict[tuple[str, tuple[str, ...]], int] = {}

    def observe(self, name: HistogramName, value: float, *labels: str) -> None:
        """Count a value. Cost: under a microsecond."""
        bounds = self._bounds[name]
        place = name, labels
        counts = self._observed.get(place)
        if counts is None:
            counts = self._observed[place] = [0.0] * (len(bounds) + 2)
        counts[bisect_left(bounds, value)] += 1
        counts[-1] += value

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Count an event. Cost: under a microsecond."""
        place = name, labels
        self._counted[place] = self._counted.get(place, 0) + by

    def total(self, name: str, total: int, *labels: str) -> None:
        """Tell the total of what something else counts since the start of this process."""
        place = name, labels
        if by := total - self._totals.get(place, 0):
            self._totals[place] = total
            self.count(name, *labels, by=by)

    def set(self, name: str, value: float, *labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def flush(self) -> None:
        """Move what was counted into Prometheus."""
        observed, self._observed = self._observed, {}
        counted, self._counted = self._counted, {}
        for (name, labels), counts in observed.items():
            histogram = self._histograms[name]
            child = histogram.labels(*labels) if labels else histogram
            for bucket, count in zip(child._buckets, counts[:-1], strict=True):  # noqa: SLF001
                # prometheus_client 0.22 to 0.26: `observe` does this for one value, nothing does it for many
                if count:
                    bucket.inc(count)
            child._sum.inc(counts[-1])  # noqa: SLF001
        for (event, labels), by in counted.items():
            self._counters[event].labels(*labels).inc(by)
        all_observed, all_counted = self._taken
        for place, counts in observed.items():
            before = all_observed.get(place)
            all_observed[place] = counts if before is None else list(map(add, before, counts))
        for event_place, by in counted.items():
            all_counted[event_place] = all_counted.get(event_place, 0) + by

    def taken(self) -> tuple[Observed, Counted]:
        """Return what was counted since the last call: counts by bucket (then the sum), and events."""
        self.flush()
        taken, self._taken = self._taken, ({}, {})
        return taken

    def exposition(self) -> bytes:
        """Return all metrics of all processes of this `serve` in Prometheus' text format."""
        self.flush()
        folder = os.environ.get(SHARED_FOLDER)
        if folder is None:
            return generate_latest(self._registry)
        _forget_dead(Path(folder))
        registry = CollectorRegistry()
        _Together(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class _Together(MultiProcessCollector):
    """Also while another process starts or dies: until it has filled its files, they cannot be read."""

    def collect(self) -> Iterable[Metric]:
        found = [str(path) for path in Path(self._path).glob("*.db") if _is_filled(path)]
        merged: Iterable[Metric] = self.merge(found)  # type: ignore[no-untyped-call]
        return merged


def _is_filled(path: Path) -> bool:
    with suppress(FileNotFoundError):  # of a process that has just died
        return path.stat().st_size > 0
    return False


def share(folder: Path) -> None:
    """Let this process, and those it starts, count together in a folder; before the first `Metrics`."""
    os.environ[SHARED_FOLDER] = str(folder)
    # prometheus_client chose when it was imported, which was before the folder was known
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]


def _forget_dead(folder: Path) -> None:
    """Drop the gauges of processes that are gone; what they counted stays."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with suppress(OSError):
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
