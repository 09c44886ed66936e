"""The open-loop generator against small servers of the test's own, and what its records are made to say."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.bench.conftest import BENCH

Handler = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules under test; `bench` is no package."""
    sys.path.insert(0, str(BENCH))
    try:
        import loadfigures
        import openloop
    finally:
        sys.path.remove(str(BENCH))

    class Modules:
        loop = openloop
        figures = loadfigures

    yield Modules
    for name in ("loadfigures", "openloop", "harness"):
        sys.modules.pop(name, None)


async def answer(
    writer: asyncio.StreamWriter, status: int = 200, body: bytes = b"{}", head: str = ""
) -> None:
    writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\n{head}\r\n".encode() + body)
    await writer.drain()


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """Yield the URL of a server that hands each request's number to a handler."""
    numbers = iter(range(10**9))

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await handler(next(numbers), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def every(bench: Any, seconds: float, n: int) -> list[Any]:
    content = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    return [bench.loop.Due(number * seconds, "get", content) for number in range(n)]


async def test_a_stall_is_paid_by_every_request_that_was_due_meanwhile(bench: Any) -> None:
    """A closed loop would tell one slow request."""
    free = asyncio.Event()

    async def stalled(number: int, writer: asyncio.StreamWriter) -> None:
        if number == 0:
            asyncio.get_running_loop().call_later(0.3, free.set)
        await free.wait()
        await answer(writer)

    async with served(stalled) as url:
        records = await bench.loop.OpenLoop(url, most_open=1).run(every(bench, 0.01, 25))
    table = records.table()
    assert table.ok.all()
    took_ms = table.took_ms[table.due_s.argsort()]
    assert took_ms[0] > 290
    assert took_ms[20] > 80, "due after 200 ms of a stall of 300"
    assert records.most_open == 1
    assert table.lag_ms.max() > 200, "what waited in the generator is told as its lag"


async def test_requests_go_out_when_they_are_due_although_none_is_answered(bench: Any) -> None:
    came: list[float] = []
    loop = asyncio.get_running_loop()

    async def late(number: int, writer: asyncio.StreamWriter) -> None:
        came.append(loop.time())
        await asyncio.sleep(0.5)
        await answer(writer)

    async with served(late) as url:
        records = await bench.loop.OpenLoop(url).run(every(bench, 0.01, 20))
    assert came[-1] - came[0] < 0.45, "all before the first reply"
    assert records.most_open == 20


async def test_what_is_not_answered_is_given_up_and_counted(bench: Any) -> None:
    async def odd(number: int, writer: asyncio.StreamWriter) -> None:
        if number == 0:
            writer.close()
        elif number == 1:
            await asyncio.sleep(5)
        elif number == 2:
            await answer(writer, 429)
        else:
            await answer(writer, 500, head="connection: close\r\n")

    async with served(odd) as url:
        records = await bench.loop.OpenLoop(url, patience_s=0.3).run(every(bench, 0.02, 4))
    told = bench.figures.figures(records.table(), 1.0, {})["all"]
    assert told["errors"] == {"connection lost": 1, "no reply in time": 1, "500": 1}
    assert told["refused"]["by_status"] == {"429": 1}
    assert told["n"] == 0
    assert told["p95"] is None


async def test_nobody_there_ends_the_run(bench: Any) -> None:
    async with served(lambda _, writer: answer(writer)) as url:
        pass
    records = await bench.loop.OpenLoop(url, patience_s=0.5).run(every(bench, 0.01, 5))
    assert set(records.table().status) == {bench.loop.UNREACHABLE}
    assert len(records) == 5


async def test_too_many_outstanding_wait_and_are_given_up(bench: Any) -> None:
    async def never(number: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with served(never) as url:
        records = await bench.loop.OpenLoop(url, most_open=2, patience_s=0.4).run(every(bench, 0.0, 6))
    assert records.most_open <= 4, "two, and the two that took their places"
    statuses = records.table().status.tolist()
    assert set(statuses) <= {bench.loop.TIMEOUT, bench.loop.UNSENT}
    assert len(statuses) == 6


async def test_a_source_that_fails_ends_the_run(bench: Any) -> None:
    def failing() -> Iterator[Any]:
        yield from every(bench, 0.0, 1)
        raise ZeroDivisionError

    async with served(lambda _, writer: answer(writer)) as url:
        with pytest.raises(ZeroDivisionError):
            await bench.loop.OpenLoop(url).run(failing())


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://example.org", "http://0.0.0.0:80"])
def test_other_machines_are_refused(bench: Any, url: str) -> None:
    with pytest.raises(ValueError, match="this machine only"):
        bench.loop.OpenLoop(url)


def test_arrivals_are_poisson_and_the_same_again(bench: Any) -> None:
    phases = [bench.loop.Phase("few", 10, 100.0), bench.loop.Phase("many", 50, 100.0)]

    def drawn() -> list[float]:
        return list(bench.loop.arrivals(phases, 2.0, random.Random(1)))

    due = drawn()
    assert due == sorted(due)
    assert due == drawn()
    few = [at_s for at_s in due if at_s < 100]
    assert len(few) == pytest.approx(2_000, rel=0.1)
    assert len(due) - len(few) == pytest.approx(10_000, rel=0.1)
    gaps = [b - a for a, b in pairwise(few)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1), "exponential gaps: not a steady beat"


def recorded(bench: Any, rows: list[tuple[float, float, int]]) -> Any:
    """Return a table of (due_s, took_ms, status)."""
    records = bench.loop.Records()
    for due_s, took_ms, status in rows:
        records.add(bench.loop.Due(due_s, "search", b""), status, due_s, due_s + took_ms / 1000, b"")
    return records.table()


def test_recovery_is_when_p95_stays_back(bench: Any) -> None:
    slow = [(at / 20, 500.0 if 10 <= at / 20 < 24 else 10.0, 200) for at in range(800)]
    told = bench.figures.recovery(recorded(bench, slow), 10.0, 20.0, 40.0)
    assert told["before_p95_ms"] == pytest.approx(10, abs=0.01)
    assert told["ratio"] == pytest.approx(50, abs=0.1)
    assert told["recovered_s"] == pytest.approx(4.0, abs=0.3)
    never = [(at_s, 500.0 if at_s >= 10 else 10.0, 200) for at_s, _, _ in slow]
    assert bench.figures.recovery(recorded(bench, never), 10.0, 20.0, 40.0)["recovered_s"] is None
    refused = [(at_s, took_ms, 503 if 20 <= at_s < 30 else 200) for at_s, took_ms, _ in slow]
    told = bench.figures.recovery(recorded(bench, refused), 10.0, 20.0, 40.0)
    assert told["recovered_s"] == pytest.approx(10.0, abs=0.3)


def test_a_step_fails_by_what_is_late_refused_or_not_answered_yet(bench: Any) -> None:
    good = [(at / 100, 10.0, 200) for at in range(200)]
    assert bench.figures.failing(recorded(bench, good), 2) == ""
    assert bench.figures.failing(recorded(bench, good), 20) == "20 of 220 late and not answered yet"
    due_s = [at / 100 for at in range(300)]
    assert bench.figures.overdue(recorded(bench, good), due_s) == 79, "the last 200 ms are not late yet"
    assert "refused" in bench.figures.failing(recorded(bench, [*good, *[(0.0, 1.0, 429)] * 5]), 0)
    assert bench.figures.failing(recorded(bench, [*good, *[(0.0, 250.0, 200)] * 20]), 0) == "P95 250 ms"


def test_growth_is_told_from_none(bench: Any) -> None:
    def grown(mb_per_hour: float) -> Any:
        samples = [
            {"at_s": at, "service_rss_bytes": 300e6 + mb_per_hour * 1e6 * at / 3600, "redis_used_bytes": None}
            for at in range(0, 1800, 10)
        ]
        slices = [{"at_s": at, "n": 100, "p50": 5.0, "p95": 10.0} for at in range(0, 1800, 10)]
        return bench.figures.growth({"samples": samples, "slices": slices}, 450.0)

    leaking = grown(60.0)["service_rss_bytes"]
    assert leaking["mb_per_hour"] == pytest.approx(60)
    assert leaking["share"] == pytest.approx(0.07, abs=0.01)
    assert leaking["none"] is False
    assert grown(1.0)["service_rss_bytes"]["none"] is True
    assert grown(1.0)["p95"]["none"] is True
    assert "redis_used_bytes" not in grown(1.0)
