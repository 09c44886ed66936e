"""Three processes, 32 clients, one store, and faults: nobody ever reads or is told what was removed before.

`REDISMEM_HISTORY_S` sets the seconds of the run; the rules are those of tests/accept/history.py. A run that
has not seen enough by then, on a slow machine, goes on until it has, up to PATIENCE times as long.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.accept.history import Bounds, Event, check
from tests.accept.history_actor import SESSIONS, USERS, Offers, Trace
from tests.accept.history_faults import Cluster, Fault
from tests.accept.history_load import MIX, TALK, Load, Mix
from tests.conftest import until

pytestmark = pytest.mark.accept

DURATION_S = float(os.environ.get("REDISMEM_HISTORY_S", "40"))
TALK_S, BROKEN_S = 8.0, 2.0
#: times as long as it should take a run may go on, and seconds until it is asked again what it lacks
PATIENCE, SLICE_S = 8, 1.0
#: seconds in which something must be loaded ahead, and for all rounds of looking at it
AHEAD_S, LOOK_S = 5.0, 60.0
#: seconds that the processes are set to keep what they cached; short, so that a run is many times as long
MEMORY_TTL_S, SEARCH_TTL_S = 3.0, 6.0

#: acknowledged operations, at least; below, the run would prove little
LEAST_DONE = {
    "search": 2700,
    "get": 800,
    "batch": 200,
    "list": 120,
    "put": 400,
    "patch": 60,
    "delete": 120,
    "correct": 16,
    "forget": 8,
    "context": 120,
    "stream": 140,
    "say": 120,
}
#: deletes acknowledged between the starts of two faults, at least
LEAST_DELETES = 1
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
#: stream; memories that a comparison left out; at least
LEAST_SHOWN = {
    **dict.fromkeys(("pinned", "matches"), 50),
    **dict.fromkeys(("topics", "prefetched", "entities", "recent", "history", "deep"), 3),
    **dict.fromkeys(("quotes of profile", "quotes of session", "quotes of entities"), 3),
}
LEAST_OVERTAKEN, LEAST_LEFT_OUT = 20, 3
#: memories that were loaded ahead and are gone, and contexts that showed others of them and nothing else
LEAST_GONE = LEAST_ALONE = 1
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

    def report(self) -> str:
        """Return what was done, seen and measured."""
        strong = [event for event in self.trace.events if event.outcome == "ok" and event.is_strong_write]
        calm = [event for event in strong if not self._overlaps_fault(event)]
        lines = [
            f"{self.trace.requests} requests in {self.seconds:.1f} s; clients {self.cpu_share:.0%} of a core",
            f"push connections cut {self.cut}; errors {len(self.trace.errors)}, unexcused {len(self.errors)}",
            f"acknowledged: {dict(Counter(e.operation for e in self.trace.events if e.outcome == 'ok'))}",
            f"contexts {len(done(self.trace, 'context'))}, streams {len(done(self.trace, 'stream'))}",
            f"removals between stages of a stream {overtaken(self.trace)}; shown: {dict(self.trace.shown)}",
            f"counted by the processes: {dict(self.counts)}",
            f"loaded ahead, and gone: {self.loaded}; then shown by {self.trace.prefetched_alone} contexts",
            f"served by: {dict(self.trace.served_by)}; strong reads and updates offered: {self.offers}",
            f"outcomes: {dict(Counter(e.outcome for e in self.trace.events))}",
            "faults: " + ", ".join(f"{f.kind} at {f.began - self.began:.1f} s" for f in self.faults),
            f"strong writes, ms: {percentiles(strong)}; away from faults: {percentiles(calm)}",
            f"searches, ms: {percentiles(done(self.trace, 'search'))}",
            f"gets, ms: {percentiles(done(self.trace, 'get'))}",
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


def done(trace: Trace, operation: str) -> list[Event]:
    """Return what was acknowledged; a context counts once, by its first stage."""
    return [e for e in trace.events if e.operation == operation and e.outcome == "ok" and e.stage in (0, 1)]


def overtaken(trace: Trace) -> int:
    """Return how many removals were answered between two stages of a stream for the same user."""
    gone, count = defaultdict[str, list[float]](list), 0
    for event in trace.events:
        if event.operation in ("delete", "correct") and event.outcome == "ok":
            gone[event.user].append(event.ended)
    before: dict[tuple[int, float], float] = {}
    for event in trace.events:
        if event.operation == "stream" and event.compared is not None:
            since = before.get((event.client, event.began), math.inf)
            count += sum(since < ended < event.compared for ended in gone[event.user])
            before[event.client, event.began] = event.ended
    return count


Lacking = Callable[[Trace, Counter[str]], list[str]]


def lacks_operations(trace: Trace, counts: Counter[str]) -> list[str]:
    """Return what was not done often enough to prove much, and what was not told."""
    strong = {
        f"strong {operation}": sum(e.consistency == "strong" for e in done(trace, operation))
        for operation in LEAST_STRONG
    }
    least = {f"strong {operation}": number for operation, number in LEAST_STRONG.items()}
    acknowledged = {operation: len(done(trace, operation)) for operation in LEAST_DONE}
    return [
        *_too_few(acknowledged, LEAST_DONE),
        *_too_few(trace.served_by, LEAST_SERVED),
        *_too_few(strong, least),
        *lacks_telling(trace, counts),
    ]


def lacks_telling(trace: Trace, counts: Counter[str]) -> list[str]:
    """Return what was not told often enough by contexts, counted by the clients and by the processes."""
    seen = {"overtaken": overtaken(trace), "left out in time": counts["left out in time"]}
    least = {"overtaken": LEAST_OVERTAKEN, "left out in time": LEAST_LEFT_OUT}
    return [*_too_few(trace.shown, LEAST_SHOWN), *_too_few(seen, least)]


def lacks_removed(trace: Trace, counts: Counter[str]) -> list[str]:
    """Return whether nobody read or was told yet what was removed."""
    rules = {violation.rule for violation in check(trace.events, Bounds(MEMORY_TTL_S, SEARCH_TTL_S))}
    return [] if "removed" in rules else ["nothing that was removed"]


def _too_few(seen: Mapping[str, int], least: Mapping[str, int]) -> Iterator[str]:
    for name, number in least.items():
        if seen.get(name, 0) < number:
            yield f"{name}: {seen.get(name, 0)} of {number}"


async def run(
    cluster: Cluster, duration_s: float, lacking: Lacking, *, mix: Mix = MIX, with_faults: bool = False
) -> Run:
    """Let the clients work for that long, or longer while something is lacking, and the cluster suffer."""
    offers = await cluster.offers()
    load = Load(cluster.ports, offers, mix)
    began, cpu = time.monotonic(), time.process_time()
    try:
        async with asyncio.timeout(PATIENCE * duration_s + 120), asyncio.TaskGroup() as group:
            group.create_task(load.run())
            try:
                await (cluster.suffer(duration_s) if with_faults else asyncio.sleep(duration_s))
                while lacking(load.trace, await cluster.context_counts()):
                    if time.monotonic() > began + PATIENCE * duration_s:
                        break
                    await asyncio.sleep(SLICE_S)
            finally:
                load.stop()
        loaded = await look_at_loaded(cluster, load)
    finally:
        load.close()
    seconds = time.monotonic() - began
    cpu_share = (time.process_time() - cpu) / seconds
    cut = sum(cluster.killed.values())
    counts = await cluster.context_counts()
    return Run(
        load.trace, cluster.faults, offers, began, seconds, cpu_share, cut, loaded, counts, cluster.logs()
    )


async def look_at_loaded(cluster: Cluster, load: Load) -> tuple[int, int]:
    """Look at what was loaded ahead, remove some and ask for the rest, until both were met.

    Returns: memories that are loaded ahead at the end, and those of them that are gone.
    """
    end_s = time.monotonic() + LOOK_S
    while True:
        await load.look_at_loaded()
        loaded = await cluster.loaded(USERS, SESSIONS)
        if (
            loaded[1] >= LEAST_GONE and load.trace.prefetched_alone >= LEAST_ALONE
        ) or time.monotonic() > end_s:
            return loaded
        await load.say_more()
        with suppress(AssertionError):  # a lane was taken, or the session was not open: say more
            await until("something is loaded ahead", lambda: _is_there(cluster), AHEAD_S)


async def _is_there(cluster: Cluster) -> bool:
    """Return whether a memory that is loaded ahead can still be shown."""
    named, gone = await cluster.loaded(USERS, SESSIONS)
    return named > gone


async def test_no_process_returns_what_was_removed(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S) as cluster:
        seen = await run(cluster, DURATION_S, lacks_operations, with_faults=True)
    told = seen.report()
    print("\n" + told)  # shown with -s
    violations = check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S))
    shown = "\n".join(map(str, violations[:SHOWN]))
    assert not violations, f"{Counter(v.rule for v in violations)}\n{shown}\n{told}"

    assert lacks_operations(seen.trace, seen.counts) == [], told
    starts = [seen.began, *(fault.began for fault in seen.faults)]
    for since, to in pairwise(starts):
        deletes = sum(since <= event.ended < to for event in done(seen.trace, "delete"))
        # a strong write may wait out a lease: in a short phase none need end
        enough = to - since < SETTLE_S or deletes >= LEAST_DELETES
        assert enough, f"{deletes} deletes from {since - seen.began:.1f} s on\n{told}"
    assert Counter(fault.kind for fault in seen.faults) == FAULTS
    assert seen.cut >= LEAST_CUT, told
    assert seen.loaded[1] >= LEAST_GONE, told
    assert seen.trace.prefetched_alone >= LEAST_ALONE, told
    few = "\n".join(seen.errors[:SHOWN])
    assert len(seen.errors) <= ERROR_SHARE * seen.trace.requests, f"{few}\n{told}\n{seen.logs}"


@pytest.mark.skipif(
    importlib.util.find_spec("redismem.coherence") is None,
    reason="there is no redismem/coherence.py yet, so there is no barrier to break",
)
async def test_a_broken_barrier_is_found(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S, broken="barrier") as cluster:
        seen = await run(cluster, BROKEN_S, lacks_removed)
    rules = Counter(violation.rule for violation in check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S)))
    print(f"\n{rules}\n{seen.report()}")  # shown with -s
    assert rules["removed"], seen.report()


async def test_a_conversation_is_told_nothing_that_was_removed(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S) as cluster:
        seen = await run(cluster, TALK_S, lacks_telling, mix=TALK)
    told = seen.report()
    print("\n" + told)  # shown with -s
    violations = check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S))
    shown = "\n".join(map(str, violations[:SHOWN]))
    assert not violations, f"{Counter(v.rule for v in violations)}\n{shown}\n{told}"
    assert lacks_telling(seen.trace, seen.counts) == [], told
    assert seen.loaded[1] >= LEAST_GONE, told
    assert seen.trace.prefetched_alone >= LEAST_ALONE, told


async def test_stages_that_are_not_compared_are_found(tmp_path: Path) -> None:
    async with Cluster(tmp_path, MEMORY_TTL_S, SEARCH_TTL_S, broken="comparison") as cluster:
        seen = await run(cluster, BROKEN_S, lacks_removed, mix=TALK)
    violations = check(seen.events(), Bounds(MEMORY_TTL_S, SEARCH_TTL_S))
    rules = Counter((violation.rule, violation.read.operation) for violation in violations)
    print(f"\n{rules}\n{seen.report()}")  # shown with -s
    assert rules["removed", "stream"] + rules["removed", "context"], seen.report()
    assert {operation for _, operation in rules} <= {"stream", "context"}, rules
