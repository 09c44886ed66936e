"""What an operator is shown: the promises, and how the service and its store are, as one document each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import get_args

import msgspec

from redismem.errors import Unavailable
from redismem.jobs import JobCounts
from redismem.slo import (
    Group,
    Minute,
    Objective,
    OperationRow,
    Window,
    evictions,
    hit_rate,
    judged,
    minute,
    operations,
    outcomes,
    window,
)
from redismem.telemetry import StoreFacts, Telemetry

_HOUR = 60
_MONTH = 30
_DAY_S = 86_400

#: seconds after the begin of a minute in which something may still be added to it
_LATE_S = 120

_GROUPS: tuple[Group, ...] = get_args(Group)

#: seconds for which what was read is good: many may look, and each look asks Redis for the newest minutes
_KEPT_S = 1.0


class SloReply(msgspec.Struct, kw_only=True):
    """Each promise: its value in the last hour, and what is left of its budget for 30 days."""

    at: datetime
    objectives: list[Objective]


class Latency(msgspec.Struct, kw_only=True):
    """Of reads, in the last one to two minutes, the last hour, and each minute of it."""

    now: Window
    hour: Window
    series: list[Minute]


class Tier(msgspec.Struct, kw_only=True):
    """One cache of the process that answers; null: not known of caches in Redis."""

    tier: str
    kind: str
    hits: int
    misses: int
    evictions: int | None = None
    invalidations: int | None = None
    entries: int | None = None
    bytes: int | None = None


class Caches(msgspec.Struct, kw_only=True):
    """Rates are of all processes in the last hour; `eviction_rate`: evictions over entries held."""

    hit_rate: float | None
    miss_rate: float | None
    evictions_hour: int
    eviction_rate: float | None
    tiers: list[Tier]


class RedisState(StoreFacts, kw_only=True):
    """Redis and the store, as seen seconds ago."""

    up: bool = True


class CoherenceState(msgspec.Struct, kw_only=True):
    """Whether L1 of the process that answers may be used."""

    live: bool
    barriers: int
    barrier_timeouts: int


class Load(msgspec.Struct, kw_only=True):
    """Requests that the process that answers works on, and those all refused in the last hour."""

    in_flight: int
    limit: int
    refused_hour: int


class DashboardReply(msgspec.Struct, kw_only=True):
    """Everything the dashboard shows."""

    at: datetime
    version: str
    uptime_s: float
    process: str
    #: that hold a lease
    processes: int
    latency: Latency
    operations: list[OperationRow]
    cache: Caches
    #: null while Redis is away
    worker: JobCounts | None
    redis: RedisState | None
    coherence: CoherenceState
    load: Load
    slo: list[Objective]


@dataclass(frozen=True)
class _Counts:
    """The history, as it was read once."""

    at_s: float
    #: begin, counts and what is shown of each minute, oldest first
    minutes: list[tuple[int, Counter[str], Minute]]
    hour: Counter[str]
    #: the day that runs, and those before it
    day: int
    before: Counter[str]
    month: Counter[str]


class Overview:
    """Makes the documents from history and telemetry."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._read: _Counts | None = None
        self._reading = asyncio.Lock()

    async def slo(self) -> SloReply:
        """Return how the promises stand; while Redis is away, as they stood.

        Raises:
            RedisUnavailable: the history was never read.
        """
        counts = await self._counts()
        return SloReply(at=_moment(counts.at_s), objectives=self._judged(counts))

    async def dashboard(self) -> DashboardReply:
        """Return everything at once; while Redis is away, with the history as it was last read.

        Raises:
            RedisUnavailable: it was never read.
        """
        told = self._telemetry
        counts = await self._counts()
        newest = _sum(one for _, one, _ in counts.minutes[-2:])
        seconds = 60 + counts.at_s % 60
        refused = sum(outcomes(counts.hour, group)["refused"] for group in _GROUPS)
        return DashboardReply(
            at=_moment(time.time()),
            version=version("redismem"),
            uptime_s=round(time.monotonic() - told.began_s, 1),
            process=told.coherence.id,
            processes=told.processes,
            latency=Latency(
                now=window(newest, seconds),
                hour=window(counts.hour, 60 * _HOUR),
                series=[shown for _, _, shown in counts.minutes],
            ),
            operations=operations(counts.hour),
            cache=self._caches(counts.hour),
            worker=told.queue,
            redis=None if told.store is None else RedisState(**msgspec.structs.asdict(told.store)),
            coherence=CoherenceState(
                live=told.coherence.is_live(),
                barriers=told.coherence.counts["barriers"],
                barrier_timeouts=told.coherence.counts["barrier_timeouts"],
            ),
            load=Load(in_flight=told.admission.in_flight, limit=told.admission.limit, refused_hour=refused),
            slo=self._judged(counts),
        )

    def _caches(self, hour: Counter[str]) -> Caches:
        told = self._telemetry
        held, entries = told.l1.stats(), self._entries()
        rate, evicted = hit_rate(hour), evictions(hour)
        tiers = [
            Tier(
                tier="l1",
                kind=kind,
                **{name: held[kind][name] for name in Tier.__struct_fields__ if name in held[kind]},
            )
            for kind in held
            if kind not in ("total", "key")
        ]
        reader = told.reader.counts
        tiers += [
            Tier(tier="l2", kind=kind, hits=reader[f"{kind} hits"], misses=reader[f"{kind} misses"])
            for kind in ("search", "embedding")
        ]
        return Caches(
            hit_rate=rate,
            miss_rate=None if rate is None else 1 - rate,
            evictions_hour=evicted,
            eviction_rate=evicted / entries if entries else None,
            tiers=tiers,
        )

    def _judged(self, counts: _Counts) -> list[Objective]:
        return judged(counts.hour, counts.month, entries=self._entries())

    def _entries(self) -> int:
        """Return the entries that all processes hold, taking the others to hold as many as this one."""
        told = self._telemetry
        return len(told.l1) * max(1, told.processes)

    async def _counts(self) -> _Counts:
        async with self._reading:
            if self._read is None or time.time() - self._read.at_s >= _KEPT_S:
                try:
                    self._read = await self._read_now(time.time(), self._read)
                except Unavailable:
                    if self._read is None:
                        raise
            return self._read

    async def _read_now(self, now_s: float, known: _Counts | None) -> _Counts:
        """Read what may have changed since the last time: reading an hour costs 15 ms of this process."""
        series, day = self._telemetry.series, int(now_s) // _DAY_S
        closed = [] if known is None else [one for one in known.minutes if one[0] <= known.at_s - _LATE_S]
        open_from = closed[-1][0] + 60 if closed else 0
        wanted = min(_HOUR, int(now_s - open_from) // 60 + 1)
        read = await series.minutes(now_s, wanted)
        minutes = [*closed, *((at, counts, minute(at, counts)) for at, counts in read)][-_HOUR:]
        if known is None or known.day != day:
            before = await series.days(now_s - _DAY_S, _MONTH - 1)
        else:
            before = known.before
        today = await series.days(now_s, 1)
        hour = _sum(counts for _, counts, _ in minutes)
        return _Counts(now_s, minutes, hour, day, before, before + today)


def _sum(many: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in many:
        total.update(one)
    return total


def _moment(at_s: float) -> datetime:
    return datetime.fromtimestamp(at_s, UTC)
