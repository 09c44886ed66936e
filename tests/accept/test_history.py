"""Three processes, 32 clients, one store, and faults: nobody ever reads or is told what was removed before.

`REDISMEM_HISTORY_S` sets the seconds of the run; the rules are those of tests/accept/history.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.accept.history import Bounds, Event, check
from tests.accept.history_actor import SESSIONS, USERS, Offers, Trace
from tests.accept.history_faults import Cluster, Fault
from tests.accept.history_load import MIX, TALK, Load, Mix

pytestmark = pytest.mark.accept

DURATION_S = float(os.environ.get("REDISMEM_HISTORY_S", "60"))
TALK_S, BROKEN_S = 12.0, 8.0
#: seconds that the processes are set to keep what they cached; short, so that a run is many times as long
MEMORY_TTL_S, SEARCH_TTL_S = 3.0, 6.0

#: acknowledged operations a second, at least; below, the run would prove little
LEAST_PER_S = {
    "search": 70,
    "get": 20,
    "batch": 5,
    "list": 3,
    "put": 10,
    "patch": 1.5,
    "delete": 3,
    "correct": 0.4,
    "forget": 0.2,
    "context": 3,
    "stream": 3.5,
    "say": 3,
}
#: deletes acknowledged a second between the starts of two faults, at least
LEAST_DELETES_PER_S = 1
#: each fault of a run, and how often
FAULTS = {
    "kill": 2,
    "stop 3 s": 1,
    "stop 1 s": 1,
    "cut push": 2,
    "redis restart": 1,
    "redis kill": 1,
    "function flush": 1,
}
#: seconds after a fault until latencies are as before: a lease of a process that is gone, and some more
SETTLE_S = 4.0
#: searches answered by a cache, connections of caches that were cut, and strong operations, at least
LEAST_SERVED = {"l1": 500, "l2": 500}
LEAST_CUT = 1
#: blocks of contexts that show memories, or quote some, by part; removals answered between two stages of a
#: stream; memories that a comparison left out; memories that were loaded ahead and are gone; at least
LEAST_SHOWN = {
    **dict.fromkeys(("pinned", "matches"), 50),
    **dict.fromkeys(("topics", "prefetched", "entities", "recent", "history", "deep"), 3),
    **dict.fromkeys(("quotes of profile", "quotes of session", "quotes of entities"), 3),
}
LEAST_OVERTAKEN, LEAST_LEFT_OUT, LEAST_GONE = 20, 3, 1
LEAST_STRONG = {"get": 20, "put": 20, "patch": 20}
#: share of the requests that may fail without a fault that excuses it
ERROR_SHARE = 0.001
#: violations shown when there are too many to read
SHOWN = 5


@dataclass(frozen=True)
class Run:
    """A run that is over."""

    trace: Trace
    faults: Sequence[Fault]
    offers: Offers
    began: float
    seconds: float
    cpu_share: float
    cut: int
    #: memories that were loaded ahead at the end, and those of them that are gone
    loaded: tuple[int, int]
    #: what the processes say of their contexts
    counts: Counter[str]
    logs: str

    def excused(self, began: float, ended: float) -> bool:
        return any(fault.excuses and began <= fault.ended and ended >= fault.began for fault in self.faults)

    @property
    def errors(self) -> list[str]:
        """Requests that failed while nothing was wrong."""
        return [
            f"at {began - self.began:.2f} s after {(ended - began):.3f} s: {what}"
            for began, ended, what in self.trace.errors
            if not self.excused(began, ended)
        ]

    def events(self) -> list[Event]:
        """Return the events; what was refused while Redis was away may have been done all the same."""
        away = [fault for fault in self.faults if fault.kind.startswith("redis")]
        return [
            replace(event, outcome="unknown")
            if event.outcome == "failed"
            and any(event.began <= fault.ended and event.ended >= fault.began for fault in away)
            else event
            for event in self.trace.events
        ]

    def done(self, operation: str) -> list[Event]:
        """Return what was acknowledged; a context counts once, by its first stage."""
        return [
            e
            for e in self.trace.events
            if e.operation == operation and e.outcome == "ok" and e.stage in (0, 1)
        ]

    @property
    def overtaken(self) -> int:
        """How many removals were answered between two stages of a stream for the same user."""
        gone, count = defaultdict[str, list[float]](list), 0
        for event in self.trace.events:
            if event.operation in ("delete", "correct") and event.outcome == "ok":
                gone[event.user].append(event.ended)
        before: dict[tuple[int, float], float] = {}
        for event in self.trace.events:
            if event.operation == "stream" and event.compared is not None:
                since = before.get((event.client, event.began), math.inf)
                count += sum(since < ended < event.compared for ended in gone[event.user])
                before[event.client, event.began] = event.ended
        return count

    def report(self) -> str:
        """Return what was done, seen and measured."""
        strong = [event for event in self.trace.events if event.outcome == "ok" and event.is_strong_write]
        calm = [event for event in strong if not self._overlaps_fault(event)]
        lines = [
            f"{self.trace.requests} requests in {self.seconds:.1f} s; clients {self.cpu_share:.0%} of a core",
            f"push connections cut {self.cut}; errors {len(self.trace.errors)}, unexcused {len(self.errors)}",
            f"acknowledged: {dict(Counter(e.operation for e in self.trace.events if e.outcome == 'ok'))}",
            f"contexts {len(self.done('context'))}, streams {len(self.done('stream'))}",
            f"removals between stages of a stream {self.overtaken}; shown: {dict(self.trace.shown)}",
            f"counted by the processes: {dict(self.counts)}",
            f"loaded ahead, and gone: {self.loaded}; then shown by {self.trace.prefetched_alone} contexts",
            f"served by: {dict(self.trace.served_by)}; strong reads and updates offered: {self.offers}",
            f"outcomes: {dict(Counter(e.outcome for e in self.trace.events))}",
            "faults: " + ", ".join(f"{f.kind} at {f.began - self.began:.1f} s" for f in self.faults),
            f"strong writes, ms: {percentiles(strong)}; away from faults: {percentiles(calm)}",
            f"searches, ms: {percentiles(self.done('search'))}; gets, ms: {percentiles(self.done('get'))}",
        ]
        shown = [f"{name}s, ms: {percentiles(self.last(name))}" for name in ("context", "stream")]
        return "\n".join([*lines, "; ".join(shown)])

    def last(self, operation: str) -> list[Event]:
        """Return the fourth stages."""
        return [e for e in self.trace.events if e.operation == operation and e.stage == 4]

    def _overlaps_fault(self, event: Event) -> bool:
        return any(
            event.began <= fault.ended + SETTLE_S and event.ended >= fault.began for fault in self.faults
        )


def percentiles(events: Sequence[Event]) -> str:
    """Return p50, p95, p99 and the largest latency in milliseconds, with n."""
    ordered = sorted((event.ended - event.began) * 1000 for event in events)
    if not ordered:
        return "none"
    ranks = [ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99, 100)]
    return " / ".join(f"{rank:.1f}" for rank in ranks) + f" (n={len(ordered)})"


async def run(cluster: Cluster, duration_s: float, *, mix: Mix = MIX, with_faults: bool = False) -> Run:
    """Let the clients work for that long, and the cluster suffer; then look at what was loaded ahead."""
    offers = await cluster.offers()
    load = Load(cluster.ports, offers, mix)
    began, cpu = time.monotonic(), time.process_time()
    async with asyncio.timeout(3 * duration_s + 120):
        working = asyncio.create_task(load.run())
        try:
            await (cluster.suffer(duration_s) if with_faults else asyncio.sleep(duration_s))
        finally:
            load.stop()
            trace = await working
    seconds = time.monotonic() - began
    cpu_share = (time.process_time() - cpu) / seconds
    cut = sum(cluster.killed.values())
    loaded = await cluster.loaded(USERS, SESSIONS)
    counts = await cluster.context_counts()
    return Run(trace, cluster.faults, offers, began, seconds, cpu_share, cut, loaded, counts, cluster.logs())


async def test_no_process_returns_what_was_removed(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S) as cluster:
        seen = await run(cluster, DURATION_S, with_faults=True)
    told = seen.report()
    print("\n" + told)  # shown with -s
    violations = check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S))
    shown = "\n".join(map(str, violations[:SHOWN]))
    assert not violations, f"{Counter(v.rule for v in violations)}\n{shown}\n{told}"

    for operation, least in LEAST_PER_S.items():
        assert len(seen.done(operation)) >= least * seen.seconds, f"too few: {operation}\n{told}"
    starts = [seen.began, *(fault.began for fault in seen.faults), seen.began + seen.seconds]
    for since, to in pairwise(starts):
        deletes = sum(since <= event.ended < to for event in seen.done("delete"))
        # a strong write may wait out a lease: in a short phase none need end
        enough = to - since < SETTLE_S or deletes >= LEAST_DELETES_PER_S * int(to - since)
        assert enough, f"{deletes} deletes from {since - seen.began:.1f} s on\n{told}"
    assert Counter(fault.kind for fault in seen.faults) == FAULTS
    for source, least in LEAST_SERVED.items():
        assert seen.trace.served_by[source] >= least, told
    for operation, least in LEAST_STRONG.items():
        assert sum(event.consistency == "strong" for event in seen.done(operation)) >= least, told
    assert seen.cut >= LEAST_CUT, told
    _assert_told_enough(seen, told)
    few = "\n".join(seen.errors[:SHOWN])
    assert len(seen.errors) <= ERROR_SHARE * seen.trace.requests, f"{few}\n{told}\n{seen.logs}"


def _assert_told_enough(seen: Run, told: str) -> None:
    for part, least in LEAST_SHOWN.items():
        assert seen.trace.shown[part] >= least, f"too few: {part}\n{told}"
    assert seen.overtaken >= LEAST_OVERTAKEN, told
    assert seen.counts["left out in time"] >= LEAST_LEFT_OUT, told
    assert seen.loaded[1] >= LEAST_GONE <= seen.trace.prefetched_alone, told


@pytest.mark.skipif(
    importlib.util.find_spec("redismem.coherence") is None,
    reason="there is no redismem/coherence.py yet, so there is no barrier to break",
)
async def test_a_broken_barrier_is_found(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S, broken="barrier") as cluster:
        seen = await run(cluster, BROKEN_S)
    rules = Counter(violation.rule for violation in check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S)))
    print(f"\n{rules}\n{seen.report()}")  # shown with -s
    assert rules["removed"], seen.report()


async def test_a_conversation_is_told_nothing_that_was_removed(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S) as cluster:
        seen = await run(cluster, TALK_S, mix=TALK)
    told = seen.report()
    print("\n" + told)  # shown with -s
    violations = check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S))
    shown = "\n".join(map(str, violations[:SHOWN]))
    assert not violations, f"{Counter(v.rule for v in violations)}\n{shown}\n{told}"
    _assert_told_enough(seen, told)


async def test_stages_that_are_not_compared_are_found(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S, broken="comparison") as cluster:
        seen = await run(cluster, BROKEN_S, mix=TALK)
    violations = check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S))
    rules = Counter((violation.rule, violation.read.operation) for violation in violations)
    print(f"\n{rules}\n{seen.report()}")  # shown with -s
    assert rules["removed", "stream"] + rules["removed", "context"], seen.report()
    assert {operation for _, operation in rules} <= {"stream", "context"}, rules
