"""The only place that holds our promises as data, judges them, and knows the names of counts. Pure.

Counts are how often what happened, under names of three kinds: "<group>:<operation>:<status>:<bucket>" for a
request that was answered (its bucket is the upper bound of its latency in ms, not cumulative),
"requests:<operation>:<outcome>" for every request, and "evictions:<cache_type>". Other names are ignored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast, get_args

from msgspec import Struct

Counts = Mapping[str, int]

Group = Literal["retrieval", "context", "update"]
#: what a name of a count begins with
Kind = Literal[Group, "requests", "evictions"]
Status = Literal["l1", "l2", "l3", "none"]
#: ok: 2xx and 3xx; client: 4xx, of a key that asks too often too; refused: 503, overload; failed: other 5xx
Outcome = Literal["ok", "client", "refused", "failed"]
#: whom an objective is about, in the words of the specification
About = Literal["memory_retrieval", "context_assembly", "memory_update", "cache"]
Unit = Literal["ms", "ratio"]
Comparison = Literal["below", "above"]

#: upper bounds of latency, ms, by group; the targets are among them, so that shares above them are exact
BOUNDS_MS: Mapping[str, tuple[int, ...]] = {
    "retrieval": (10, 25, 50, 75, 100, 150, 200, 300, 500, 1000),
    "context": (10, 25, 50, 75, 100, 150, 200, 300, 400, 500, 1000),
    "update": (10, 25, 50, 100, 200, 300, 500, 1000, 2000),
}

#: names of a group's buckets, in the order of its bounds; the last is open
BUCKETS: Mapping[str, tuple[str, ...]] = {
    group: (*map(str, bounds), "inf") for group, bounds in BOUNDS_MS.items()
}

_OPERATIONS: Mapping[Group, str] = {
    "retrieval": "search search_batch get list history export session_get"
    " profile topics summary similar conflicts",
    "context": "context context_batch context_stream",
    "update": "put patch delete correct forget import profile_patch message typing"
    " session_open session_patch session_close",
}

#: operation -> its group; what is not here belongs to no objective
GROUPS: Mapping[str, Group] = {
    operation: group for group, operations in _OPERATIONS.items() for operation in operations.split()
}

_BOUNDS_S = {group: tuple(bound / 1000 for bound in bounds) for group, bounds in BOUNDS_MS.items()}
_PLACES = {group: {name: at for at, name in enumerate(names)} for group, names in BUCKETS.items()}
_STATUSES, _OUTCOMES = get_args(Status), get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Goal:
    """A promise. A value at its target keeps it: its budget is then used up, and not more than that."""

    name: str
    about: About
    what: str
    measure: Literal["latency", "outcomes", "misses", "evictions"]
    comparison: Comparison
    #: ms of a latency, else a share
    target: float
    #: share of bad events in 30 days that keeps the promise: slower than the target, of a bad outcome, missed
    allowed: float | None
    #: whose requests
    group: Group = "retrieval"
    #: of a latency
    quantile: float = 0.0
    #: outcomes that break the promise
    bad: tuple[Outcome, ...] = ()


_P95, _P99 = "95th percentile of latency", "99th percentile of latency"
_DONE, _FAILED = "share of requests neither refused nor failed", "share of requests that failed"
_HITS = "share of cacheable reads that a cache answered"
_EVICTIONS = "entries that left for room in an hour, as a share of those held"
_LOST: tuple[Outcome, ...] = ("refused", "failed")

# fmt: off
GOALS = (
    Goal("retrieval_p95", "memory_retrieval", _P95, "latency", "below", 100, 0.05, "retrieval", 0.95),
    Goal("retrieval_p99", "memory_retrieval", _P99, "latency", "below", 200, 0.01, "retrieval", 0.99),
    Goal("retrieval_availability", "memory_retrieval", _DONE, "outcomes", "above", 0.999, 0.001, bad=_LOST),
    Goal("retrieval_errors", "memory_retrieval", _FAILED, "outcomes", "below", 0.001, 0.001, bad=("failed",)),
    Goal("context_p95", "context_assembly", _P95, "latency", "below", 200, 0.05, "context", 0.95),
    Goal("context_p99", "context_assembly", _P99, "latency", "below", 400, 0.01, "context", 0.99),
    Goal("update_p95", "memory_update", _P95, "latency", "below", 500, 0.05, "update", 0.95),
    Goal("update_success", "memory_update", _DONE, "outcomes", "above", 0.9995, 0.0005, "update", bad=_LOST),
    Goal("cache_hit_rate", "cache", _HITS, "misses", "above", 0.70, 0.30),
    Goal("cache_eviction_rate", "cache", _EVICTIONS, "evictions", "below", 0.05, None),
)
# fmt: on


class Budget(Struct, kw_only=True):
    """What a promise may cost: a share of bad events. `left` is negative when more than that is spent."""

    window: str
    allowed: float
    spent: float
    #: 1 - spent / allowed
    left: float


class Objective(Struct, kw_only=True):
    """A promise, whether it is kept, and what is left of its budget. Null: nothing happened in the window."""

    name: str
    about: About
    what: str
    unit: Unit
    comparison: Comparison
    target: float
    window: str
    value: float | None
    #: a value at the target keeps it
    met: bool | None
    #: events that the value is made of; of evictions, the entries held
    samples: int
    budget: Budget | None


class Window(Struct, kw_only=True):
    """Reads of a while that were answered. Null: there were none, or none that could be cached."""

    count: int
    per_second: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    hit_rate: float | None


class Minute(Struct, kw_only=True):
    """Reads of the minute that began at `at`, in epoch seconds; `errors` are those that failed."""

    at: int
    count: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    hit_rate: float | None
    errors: int


class OperationRow(Struct, kw_only=True):
    """Requests of one operation, however they ended; latencies are of those that were answered."""

    operation: str
    group: Group
    count: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    #: null where nothing could be cached
    hit_rate: float | None
    failed: int


def count_name(*parts: str) -> str:
    """Return the name of a count, such as of ("retrieval", "search", "l1", "10").

    Raises:
        ValueError: there is no such count.
    """
    name = ":".join(parts)
    if parts_of(name) != parts:
        raise ValueError(f"no name of a count: {name}")
    return name


@lru_cache(maxsize=8192)
def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts of a count's name; none of one that is not ours, but a newer version's or foreign.

    Cost: kept, as a dashboard asks for some hundred names in each of sixty minutes.
    """
    match parts := tuple(name.split(":")):
        case ("requests", operation, outcome) if operation and outcome in _OUTCOMES:
            return parts
        case ("evictions", cache_type) if cache_type:
            return parts
        case (group, operation, status, bucket) if operation and status in _STATUSES:
            return parts if bucket in _PLACES.get(group, ()) else ()
    return ()


def bucket_of(group: Group, seconds: float) -> str:
    """Return the name of the bucket that a latency falls into; a latency at a bound is below it."""
    return BUCKETS[group][bisect_left(_BOUNDS_S[group], seconds)]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies by bucket: one count more than there are bounds, the last is of what is above them all."""

    bounds_ms: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile_ms(self, q: float) -> float | None:
        """Return the latency that a share `q` does not exceed, as `histogram_quantile` of Prometheus does.

        Within a bucket latencies count as spread evenly. In the open one it is the highest bound: a
        lower limit. None without data.
        """
        rank = q * self.count
        below, low = 0, 0
        for bound, count in zip(self.bounds_ms, self.counts, strict=False):
            if count and below + count >= rank:
                return low + (bound - low) * (rank - below) / count
            below, low = below + count, bound
        return float(low) if self.count else None

    def share_above(self, ms: float) -> float | None:
        """Return the share of latencies above one of the bounds; None without data.

        Raises:
            ValueError: it is no bound.
        """
        above = sum(self.counts[self.bounds_ms.index(ms) + 1 :])
        return _share(above, self.count)


def latency(counts: Counts, group: Group, operations: Container[str] | None = None) -> Histogram:
    """Return the latencies of a group, or of some of its operations."""
    found = [0] * len(BUCKETS[group])
    for (_, operation, _, bucket), count in _counted(counts, group):
        if operations is None or operation in operations:
            found[_PLACES[group][bucket]] += count
    return Histogram(BOUNDS_MS[group], tuple(found))


def hit_rate(counts: Counts) -> float | None:
    """Return the share of cacheable reads that L1 or L2 answered; None without any."""
    hits, misses = _looked_up(counts)
    return _share(hits, hits + misses)


def evictions(counts: Counts) -> int:
    """Return how many entries left the caches for room."""
    return sum(count for _, count in _counted(counts, "evictions"))


def outcomes(counts: Counts, group: Group) -> Counter[Outcome]:
    """Return how the requests of a group ended."""
    found: Counter[Outcome] = Counter()
    for (_, operation, outcome), count in _counted(counts, "requests"):
        if GROUPS.get(operation) == group:
            found[cast("Outcome", outcome)] += count
    return found


def judged(hour: Counts, month: Counts, *, entries: int) -> list[Objective]:
    """Return every promise: its value in the last hour, its budget in the last 30 days.

    Args:
        entries: held by the caches that `evictions:` counts are of, in all processes.
    """
    return [_judged(goal, hour, month, entries) for goal in GOALS]


def window(counts: Counts, seconds: float) -> Window:
    """Return what the reads of so many seconds were like."""
    reads = latency(counts, "retrieval")
    return Window(
        count=reads.count,
        per_second=reads.count / seconds,
        p50_ms=reads.quantile_ms(0.5),
        p95_ms=reads.quantile_ms(0.95),
        p99_ms=reads.quantile_ms(0.99),
        hit_rate=hit_rate(counts),
    )


def minute(at: int, counts: Counts) -> Minute:
    """Return what the reads of the minute that began at `at` were like."""
    reads = latency(counts, "retrieval")
    return Minute(
        at=at,
        count=reads.count,
        p50_ms=reads.quantile_ms(0.5),
        p95_ms=reads.quantile_ms(0.95),
        p99_ms=reads.quantile_ms(0.99),
        hit_rate=hit_rate(counts),
        errors=outcomes(counts, "retrieval")["failed"],
    )


def operations(counts: Counts) -> list[OperationRow]:
    """Return the operations that were asked for, most frequent first, then by name."""
    own: dict[str, dict[str, int]] = defaultdict(dict)
    for name, count in counts.items():
        kind, operation, *_ = parts_of(name) or ("", "")
        if operation in GROUPS and kind in ("requests", GROUPS[operation]):
            own[operation][name] = count
    rows = (_row(operation, GROUPS[operation], counted) for operation, counted in own.items())
    return sorted(rows, key=lambda row: (-row.count, row.operation))


def _judged(goal: Goal, hour: Counts, month: Counts, entries: int) -> Objective:
    samples, value = _bad(goal, hour, entries)
    if goal.measure == "latency":
        value = latency(hour, goal.group).quantile_ms(goal.quantile)
    elif value is not None and goal.comparison == "above":
        value = 1 - value
    met = None
    if value is not None:
        met = value <= goal.target if goal.comparison == "below" else value >= goal.target
    return Objective(
        name=goal.name,
        about=goal.about,
        what=goal.what,
        unit="ms" if goal.measure == "latency" else "ratio",
        comparison=goal.comparison,
        target=goal.target,
        window="1h",
        value=value,
        met=met,
        samples=samples,
        budget=_budget(goal, month, entries),
    )


def _budget(goal: Goal, month: Counts, entries: int) -> Budget | None:
    _, spent = _bad(goal, month, entries)
    if goal.allowed is None or spent is None:
        return None
    return Budget(window="30d", allowed=goal.allowed, spent=spent, left=1 - spent / goal.allowed)


def _bad(goal: Goal, counts: Counts, entries: int) -> tuple[int, float | None]:
    """Return how many events a goal is about, and the share of bad ones."""
    match goal.measure:
        case "latency":
            histogram = latency(counts, goal.group)
            return histogram.count, histogram.share_above(goal.target)
        case "outcomes":
            ended = outcomes(counts, goal.group)
            return ended.total(), _share(sum(ended[outcome] for outcome in goal.bad), ended.total())
        case "misses":
            hits, misses = _looked_up(counts)
            return hits + misses, _share(misses, hits + misses)
        case "evictions":
            return entries, _share(evictions(counts), entries)


def _row(operation: str, group: Group, counts: Counts) -> OperationRow:
    answered, ended = latency(counts, group), outcomes(counts, group)
    return OperationRow(
        operation=operation,
        group=group,
        count=ended.total(),
        p50_ms=answered.quantile_ms(0.5),
        p95_ms=answered.quantile_ms(0.95),
        p99_ms=answered.quantile_ms(0.99),
        hit_rate=hit_rate(counts),
        failed=ended["failed"],
    )


def _counted(counts: Counts, kind: Kind) -> Iterator[tuple[tuple[str, ...], int]]:
    """Return the parts of the names of a kind, and their counts."""
    for name, count in counts.items():
        parts = parts_of(name)
        if parts and parts[0] == kind:
            yield parts, count


def _looked_up(counts: Counts) -> tuple[int, int]:
    """Return how many reads a cache answered, and how many it could have."""
    found: Counter[str] = Counter()
    for (_, _, status, _), count in _counted(counts, "retrieval"):
        found[status] += count
    return found["l1"] + found["l2"], found["l3"]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
