"""Limits of API keys on a real server: what a fleet is granted, what that costs, what odd clocks do."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from redismem.apikeys import ApiKey, issued
from redismem.client import Client
from redismem.embedded import EmbeddedRedis
from redismem.errors import StoreError
from redismem.keys import rate_key
from redismem.lualib import Functions, fcall, load_libraries
from redismem.ratelimit import VOID_AFTER_S, Limiter
from redismem.service import Service
from redismem.settings import Settings
from tests.conftest import until
from tests.redis.conftest import Counter

NOW_MS = 1_790_000_000_000


def key_with(rate_per_s: float | None, burst: int | None = None) -> ApiKey:
    now = datetime(2026, 3, 1, tzinfo=UTC)
    return issued(name="agent", scopes=["read"], rate_per_s=rate_per_s, burst=burst, now=now)[0]


@dataclass
class Clock:
    """A clock that goes when it is told to."""

    now_s: float = NOW_MS / 1000

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(service: Service, clock: Clock) -> Limiter:
    return Limiter(service.functions, clock=clock, elapsed=clock)


async def passes(limiter: Limiter, key: ApiKey, tries: int) -> int:
    """Return how many of some requests pass."""
    return sum([await limiter.take(key) == 0 for _ in range(tries)])


async def test_a_burst_passes_and_then_the_rate(limiter: Limiter, clock: Clock) -> None:
    key = key_with(1, 25)
    assert await passes(limiter, key, 100) == 25
    clock.now_s += 10
    assert await passes(limiter, key, 100) == 10
    clock.now_s += 600
    assert await passes(limiter, key, 100) == 25


async def test_a_refusal_tells_when_another_try_passes(limiter: Limiter, clock: Clock) -> None:
    key = key_with(0.05, 1)
    assert await limiter.take(key) == 0
    assert await limiter.take(key) == pytest.approx(20)
    clock.now_s += 15
    assert await limiter.take(key) == pytest.approx(5)
    clock.now_s += 5.01
    assert await limiter.take(key) == 0


async def test_keys_do_not_share_their_limits(limiter: Limiter) -> None:
    one, other = key_with(1), key_with(1)
    assert [await limiter.take(one), await limiter.take(other)] == [0, 0]
    assert await limiter.take(one) > 0


async def test_a_fleet_is_never_granted_more_than_burst_and_rate_allow(service: Service) -> None:
    key, fleet, asking, asked_s = key_with(200, 50), 5, 8, 2.0
    passed: list[float] = []

    async def client(limiter: Limiter, began_s: float) -> None:
        while time.monotonic() < began_s + asked_s:
            if limiter.try_take(key) or not (wait_s := await limiter.take(key)):
                passed.append(time.monotonic() - began_s)
            else:
                await asyncio.sleep(min(wait_s, 0.01))

    async with AsyncExitStack() as stack:
        limiters = []
        for _ in range(fleet):
            connection = Client(service.settings, service.client.url)
            stack.push_async_callback(connection.close)
            await connection.execute("PING")
            limiters.append(Limiter(Functions(connection)))
        began_s = time.monotonic()
        await asyncio.gather(*[client(limiter, began_s) for limiter in limiters for _ in range(asking)])
    passed.sort()
    # a millisecond, because clocks are told in whole ones
    over = [n - (50 + 200 * (at_s + 0.001)) for n, at_s in enumerate(passed, 1)]
    assert max(over) <= 0
    assert len(passed) > 0.5 * (50 + 200 * asked_s), "the limit is also what may be used"


async def test_most_requests_cost_no_round_trip(limiter: Limiter, clock: Clock, round_trips: Counter) -> None:
    key = key_with(1000)
    with round_trips() as sent:
        for _ in range(500):
            assert limiter.try_take(key) or await limiter.take(key) == 0
            clock.now_s += 0.001
    assert sent == ["FCALL"] * 10


async def test_what_is_not_used_within_a_second_is_void(limiter: Limiter, clock: Clock) -> None:
    key = key_with(100)
    assert await limiter.take(key) == 0
    clock.now_s += VOID_AFTER_S - 0.01
    assert limiter.try_take(key)
    clock.now_s += 0.01
    assert not limiter.try_take(key)


async def test_a_key_without_a_limit_asks_nobody(limiter: Limiter, round_trips: Counter) -> None:
    key = key_with(None)
    with round_trips() as sent:
        assert limiter.try_take(key)
        assert await passes(limiter, key, 10) == 10
    assert sent == []


async def test_nothing_passes_by_what_is_at_hand_before_something_was_taken(limiter: Limiter) -> None:
    assert not limiter.try_take(key_with(1000))


async def test_a_flood_of_refused_requests_costs_one_call_a_token(
    limiter: Limiter, clock: Clock, round_trips: Counter
) -> None:
    key = key_with(10, 1)
    assert await limiter.take(key) == 0
    with round_trips() as sent:
        for _ in range(1000):
            await limiter.take(key)
            clock.now_s += 0.001
    assert len(sent) <= 2 * 10 + 1


async def test_requests_that_wait_together_are_granted_together(
    limiter: Limiter, round_trips: Counter
) -> None:
    key = key_with(100, 1000)  # a twentieth of a second would be five
    with round_trips() as sent:
        assert await asyncio.gather(*[limiter.take(key) for _ in range(300)]) == [0] * 300
    assert len(sent) <= 3


async def test_a_caller_who_leaves_does_not_take_the_others_along(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, asked = Functions.call, asyncio.Event()

    async def never(self: Functions, *arguments: Any) -> Any:
        if not asked.is_set():
            asked.set()
            await asyncio.Event().wait()
        return await call(self, *arguments)

    monkeypatch.setattr(Functions, "call", never)
    key = key_with(1, 2)
    first = asyncio.create_task(limiter.take(key))
    await asked.wait()
    others = [asyncio.create_task(limiter.take(key)) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    waits = await asyncio.wait_for(asyncio.gather(*others), 10)
    assert sorted(wait > 0 for wait in waits) == [False, False, True]


@dataclass
class Bucket:
    """The model of rm_take_v1."""

    rate: float
    burst: int
    tokens: float
    latest_ms: int = 0

    def take(self, now_ms: int, want: int) -> int:
        latest_ms = max(self.latest_ms, now_ms)
        tokens = min(self.burst, self.tokens + (latest_ms - self.latest_ms) * self.rate / 1000)
        granted = min(want, int(tokens))
        if granted:
            self.tokens, self.latest_ms = tokens - granted, latest_ms
        return granted


async def test_grants_follow_the_model_whatever_the_clocks_of_those_who_ask(service: Service) -> None:
    draw = random.Random(7)
    for rate, burst in ((0.01, 1), (0.5, 3), (7.3, 20), (1000, 50), (1e6, 1_000_000)):
        key = key_with(rate, burst)
        model, now_ms = Bucket(rate, burst, burst, NOW_MS), NOW_MS
        calls = []
        for _ in range(100):
            now_ms += draw.choice((0, 0, 1, 50, int(1000 / rate)))
            calls.append((now_ms + draw.choice((0, 0, -40, 40)), draw.choice((1, 2, burst))))
        # in a transaction, where the clock of Redis stands still and nothing expires
        replies = await service.client.execute_atomically(
            [fcall("rm_take_v1", [rate_key(key.id)], at_ms, rate, burst, want) for at_ms, want in calls]
        )
        assert [granted for granted, _ in replies] == [model.take(*call) for call in calls]
        span_s = (max(at_ms for at_ms, _ in calls) - NOW_MS) / 1000
        assert sum(granted for granted, _ in replies) <= burst + rate * span_s
        assert all(wait_ms > 0 or granted for granted, wait_ms in replies)


async def test_a_clock_that_runs_an_hour_ahead_gives_no_more_than_a_full_bucket(service: Service) -> None:
    key, now = key_with(0.01, 5), Clock()
    right = Limiter(service.functions, clock=now, elapsed=now)
    ahead = Limiter(service.functions, clock=lambda: now.now_s + 3600, elapsed=now)
    assert await passes(right, key, 10) == 5
    assert await passes(ahead, key, 10) == 5
    assert await passes(right, key, 10) == 0


async def test_a_clock_that_ran_ahead_does_not_lock_the_others_out(service: Service) -> None:
    key = key_with(10, 2)
    ahead = Limiter(service.functions, clock=lambda: time.time() + 3600)
    assert await passes(ahead, key, 3) == 2
    right = Limiter(service.functions)  # it asks all the time, which must not keep the bucket alive
    assert await right.take(key) > 0

    async def passed() -> bool:
        return await right.take(key) == 0

    await until("the bucket is full by Redis's clock", passed, timeout_s=2)


async def test_a_bucket_expires_when_it_is_full_again(service: Service, limiter: Limiter) -> None:
    key = key_with(0.05, 3)
    await limiter.take(key)
    assert 15_000 < await service.client.execute("PTTL", rate_key(key.id)) <= 20_000
    await limiter.take(key)
    assert 35_000 < await service.client.execute("PTTL", rate_key(key.id)) <= 40_000


@pytest.mark.parametrize("spoiled", ["", "nan 1", "x y", "-1 5", "9 1", "inf 1790000000000", "1"])
async def test_a_spoiled_bucket_is_a_full_one(service: Service, limiter: Limiter, spoiled: str) -> None:
    key = key_with(0.01, 3)
    await service.client.execute("SET", rate_key(key.id), spoiled)
    assert await passes(limiter, key, 5) == 3


async def test_another_type_in_the_place_of_a_bucket_is_told(service: Service, limiter: Limiter) -> None:
    key = key_with(1)
    await service.client.execute("HSET", rate_key(key.id), "a", "b")
    with pytest.raises(StoreError, match="RMEM_TYPE"):
        await limiter.take(key)
    await service.client.execute("DEL", rate_key(key.id))
    assert await limiter.take(key) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (NOW_MS, 1, 1),
        (0, 1, 1, 1),
        (NOW_MS + 0.5, 1, 1, 1),
        (NOW_MS, 0, 1, 1),
        (NOW_MS, "nan", 1, 1),
        (NOW_MS, 1, 0, 1),
        (NOW_MS, 1, 1.5, 1),
        (NOW_MS, 1, 1, 0),
        (NOW_MS, 1, 1, "x"),
    ],
)
async def test_misuse_is_told_and_changes_nothing(service: Service, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(StoreError, match="RMEM_USAGE"):
        await service.functions.call("rm_take_v1", ["redismem:rate:0123456789ab"], *arguments)
    assert await service.client.execute("EXISTS", "redismem:rate:0123456789ab") == 0


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server that the test may stop."""
    async with EmbeddedRedis(tmp_path, persist=False) as redis:
        yield redis
        if redis.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(redis.pid, signal.SIGCONT)


async def test_everything_passes_while_redis_is_away(mortal: EmbeddedRedis) -> None:
    client = Client(Settings(redis_timeout_s=0.3), mortal.url)
    await load_libraries(client)
    limiter, key = Limiter(Functions(client)), key_with(0.01, 1)
    assert await limiter.take(key) == 0
    limiter = Limiter(Functions(client))
    assert await limiter.take(key) > 0
    limiter = Limiter(Functions(client))
    assert mortal.pid is not None
    os.kill(mortal.pid, signal.SIGSTOP)
    assert await asyncio.wait_for(asyncio.gather(*[limiter.take(key) for _ in range(10)]), 10) == [0] * 10
    os.kill(mortal.pid, signal.SIGCONT)

    async def refused() -> bool:
        return await limiter.take(key) > 0

    await until("the limit holds again", refused)
    await client.close()
