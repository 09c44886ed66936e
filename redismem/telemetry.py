"""Tells metrics what the parts of one process hold and did, and adds what it counted to the store's history.

The parts count for themselves; here their counts are read once a second. What the store is like is asked
every few seconds, by each process: whichever is asked then knows it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from redismem.admission import Admission
from redismem.client import Client
from redismem.coherence import Coherence
from redismem.errors import RedisMemError, Unavailable
from redismem.jobs import JobCounts, Jobs
from redismem.keys import LEASES, STORE
from redismem.l1 import L1
from redismem.maintain import Maintenance, Round
from redismem.metrics import Counted, Metrics, Observed
from redismem.prefetch import Prefetcher
from redismem.read import Reader
from redismem.series import Series
from redismem.slo import BUCKETS, count_name
from redismem.worker.worker import Worker

logger = logging.getLogger(__name__)

#: seconds between two looks at the event loop's lag, the caches, the store, and two additions to the history
_LAG_S, _SAMPLE_S, _STORE_S, _SERIES_S = 0.25, 1.0, 5.0, 10.0

#: the kinds of L1, as `cache_type` calls them
_L1_TYPES = {kind: f"l1_{kind}" for kind in ("search", "memory", "profile", "context")} | {
    "embedding": "l1_vector"
}
#: what the reader counts of Redis' caches
_L2_TYPES = {"search": "l2_search", "embedding": "l2_vector"}

_GROUPS = ("retrieval", "context", "update")


class StoreFacts(msgspec.Struct, kw_only=True):
    """What Redis says of itself, and what the last maintenance counted; null before the first."""

    version: str
    memory_bytes: int
    #: 0: no limit
    max_memory_bytes: int
    #: of RediSearch's indexes
    index_bytes: int
    users: int | None = None
    vectors: int | None = None
    graphs: int | None = None
    parked: int | None = None


@dataclass
class Telemetry:
    """What is told of one process, and of the store as it last saw it."""

    client: Client
    metrics: Metrics
    series: Series
    l1: L1
    reader: Reader
    coherence: Coherence
    prefetcher: Prefetcher
    admission: Admission
    maintenance: Maintenance
    jobs: Jobs
    worker: Worker
    #: this process answers requests; else it is a worker's
    serves: bool = True
    began_s: float = field(default_factory=time.monotonic)
    #: None while Redis is away
    store: StoreFacts | None = None
    queue: JobCounts | None = None
    #: that hold a lease
    processes: int = 0
    #: not yet in the history
    _pending: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        """Go on until cancelled; what was counted by then is added to the history."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._every(_SAMPLE_S, self._sample))
                if self.serves:
                    tasks.create_task(self._watch_loop())
                    tasks.create_task(self._every(_STORE_S, self.look))
                    tasks.create_task(self._every(_SERIES_S, self.save))
        finally:
            if self.serves:
                with suppress(RedisMemError):
                    await self.save()

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except RedisMemError as exc:
                logger.debug("counted later: %s", exc)
            except Exception:  # a defect in counting must not end the service
                logger.exception("counting failed")
            await asyncio.sleep(seconds)

    async def _watch_loop(self) -> None:
        while True:
            asked_s = time.perf_counter()
            await asyncio.sleep(_LAG_S)
            self.metrics.observe("lag", max(0.0, time.perf_counter() - asked_s - _LAG_S))

    async def _sample(self) -> None:
        self.sample()

    def sample(self) -> None:
        """Read what the parts of this process count and hold. Cost: 0.1 ms, no I/O."""
        metrics = self.metrics
        held = self.l1.stats()
        for kind, cache in _L1_TYPES.items():
            counted = held[kind]
            metrics.total("cache_hits", counted["hits"], cache)
            metrics.total("cache_misses", counted["misses"], cache)
            metrics.total("redismem_cache_evictions", counted["evictions"], cache)
            metrics.total("redismem_cache_invalidations", counted["invalidations"], cache)
            metrics.set("cache_size_bytes", counted["bytes"], cache)
            metrics.set("redismem_cache_entries", counted["entries"], cache)
        for kind, cache in _L2_TYPES.items():
            metrics.total("cache_hits", self.reader.counts[f"{kind} hits"], cache)
            metrics.total("cache_misses", self.reader.counts[f"{kind} misses"], cache)
        for signal, counts in self.prefetcher.stats().items():
            for outcome in ("issued", "used", "wasted"):
                metrics.total("redismem_prefetch", counts.get(outcome, 0), signal, outcome)
        for name, count in self.worker.counts.items():
            kind, _, outcome = name.rpartition(" ")
            metrics.total("redismem_jobs_done", count, kind, outcome)
        if self.serves:
            metrics.set("redismem_lease_live", self.coherence.is_live())
            metrics.set("redismem_processes", 1)
            metrics.set("redismem_in_flight", self.admission.in_flight)
            metrics.set("redismem_in_flight_limit", self.admission.limit)
            metrics.set("redismem_index_build_seconds", self.maintenance.building_s())
        metrics.flush()

    async def look(self) -> None:
        """Ask Redis how it and the store are. Cost: two round trips."""
        try:
            self.queue = await self.jobs.counts()
            self.store = await self._facts()
        except Unavailable:
            self.queue = self.store = None
            self.metrics.set("redismem_redis_up", 0)
            return
        metrics, store, queue = self.metrics, self.store, self.queue
        metrics.set("redismem_redis_up", 1)
        metrics.set("redismem_redis_memory_bytes", store.memory_bytes)
        metrics.set("redismem_redis_max_memory_bytes", store.max_memory_bytes)
        metrics.set("index_memory_bytes", store.index_bytes)
        if store.users is not None and store.vectors is not None:
            metrics.set("redismem_users", store.users)
            metrics.set("index_size_vectors", store.vectors)
        metrics.set("redismem_job_lag_seconds", queue.late_s)
        for state in ("waiting", "due", "started", "failing", "dead"):
            metrics.set("redismem_jobs", getattr(queue, state), state)

    async def _facts(self) -> StoreFacts:
        info, raw, self.processes = await self.client.pipeline(
            [("INFO", "server", "memory", "modules"), ("HGET", STORE, "maintenance"), ("HLEN", LEASES)]
        )
        lines = (line.partition(":") for line in info.decode().splitlines())
        told = {name: value for name, _, value in lines}
        facts = StoreFacts(
            version=told["redis_version"],
            memory_bytes=int(told["used_memory"]),
            max_memory_bytes=int(told["maxmemory"]),
            index_bytes=int(told.get("search_used_memory_indexes", 0)),
        )
        if raw is not None:
            seen = msgspec.json.decode(raw, type=Round)
            facts.users, facts.vectors = seen.users, seen.memories
            facts.graphs, facts.parked = seen.graphs, seen.parked
        return facts

    async def save(self) -> None:
        """Add what was counted to the history; what cannot be added now is added later."""
        self.sample()
        self._pending.update(history(*self.metrics.taken()))
        counts, self._pending = self._pending, Counter()
        try:
            await self.series.add(counts, time.time())
        except RedisMemError:
            # perhaps only the answer is missing: rather counted twice than an outage forgotten
            self._pending.update(counts)
            raise


def history(observed: Observed, counted: Counted) -> Mapping[str, int]:
    """Return what the history keeps of what was counted."""
    counts: Counter[str] = Counter()
    for (name, labels), buckets in observed.items():
        if name not in _GROUPS:
            continue
        operation, status = (*labels, "none")[:2]
        for bucket, count in zip(BUCKETS[name], buckets, strict=False):
            if count:
                counts[count_name(name, operation, status, bucket)] += int(count)
    for (event, labels), by in counted.items():
        if event == "redismem_requests":
            counts[count_name("requests", *labels)] += by
        elif event == "redismem_cache_evictions":
            counts[count_name("evictions", *labels)] += by
    return counts
