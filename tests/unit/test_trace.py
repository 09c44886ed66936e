"""What a request collects on its way, and what belongs to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from redismem.trace import Trace, current, waiting


@pytest.fixture
def trace() -> Iterator[Trace]:
    one = Trace("search", "r1")
    token = current.set(one)
    yield one
    current.reset(token)


def spend(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def test_waits_outside_of_requests_are_nobodys() -> None:
    assert current.get() is None
    with waiting("embed"):
        pass
    assert current.get() is None


def test_waits_of_one_part_add_up_and_parts_are_apart(trace: Trace) -> None:
    for _ in range(3):
        with waiting("embed"):
            spend(0.01)
    with waiting("barrier"):
        spend(0.01)
    assert set(trace.spent_s) == {"embed", "barrier"}
    assert trace.spent_s["embed"] >= 0.03
    assert 0.01 <= trace.spent_s["barrier"] < trace.spent_s["embed"]


def test_a_wait_that_fails_counts_and_its_error_passes(trace: Trace) -> None:
    def fail() -> None:
        with waiting("redis"):
            spend(0.005)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert trace.spent_s["redis"] >= 0.005


def test_the_split_is_milliseconds_of_each_part_and_of_all(trace: Trace) -> None:
    with waiting("redis"):
        spend(0.02)
    split = trace.split_ms()
    assert set(split) == {"total_ms", "redis_ms"}
    assert 20 <= split["redis_ms"] <= split["total_ms"] < 5000


def test_spans_are_kept_only_where_somebody_wants_them(trace: Trace) -> None:
    with waiting("redis"):
        pass
    assert trace.spans is None
    trace.spans = []
    before_s = time.perf_counter()
    with waiting("embed"):
        spend(0.001)
    ((part, began_s, end_s),) = trace.spans
    assert part == "embed"
    assert before_s <= began_s < end_s <= time.perf_counter()


async def test_requests_that_run_at_once_do_not_mix() -> None:
    both = asyncio.Barrier(2)

    async def request(operation: str, part: str) -> Trace:
        trace = Trace(operation, operation)
        current.set(trace)
        await both.wait()
        with waiting(part):  # type: ignore[arg-type]  # one of them
            await both.wait()
        return trace

    one, other = await asyncio.gather(
        asyncio.create_task(request("search", "embed")), asyncio.create_task(request("get", "redis"))
    )
    assert (set(one.spent_s), set(other.spent_s)) == ({"embed"}, {"redis"})


async def test_tasks_that_a_request_starts_belong_to_it(trace: Trace) -> None:
    async def part() -> None:
        with waiting("redis"):
            await asyncio.sleep(0)

    await asyncio.gather(*(asyncio.create_task(part()) for _ in range(2)))
    assert set(trace.spent_s) == {"redis"}
