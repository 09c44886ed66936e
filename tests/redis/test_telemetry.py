"""What a process counts reaches the history once, whatever Redis does meanwhile, and operators see it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from redismem.embedded import EmbeddedRedis
from redismem.errors import RedisUnavailable
from redismem.metrics import Metrics
from redismem.service import Service, assembled, open_service
from redismem.settings import Settings
from redismem.slo import parts_of
from redismem.telemetry import history
from redismem.trace import Trace, current
from redismem.types import MemoryInput, SearchRequest
from tests.conftest import until


async def kept(service: Service) -> Counter[str]:
    """Return what the history holds of the last two minutes."""
    minutes = await service.telemetry.series.minutes(time.time(), 2)
    return sum((counts for _, counts in minutes), Counter())


def ask(service: Service, times: int, seconds: float = 0.03) -> None:
    """Count requests as the gate does."""
    for _ in range(times):
        service.metrics.observe("retrieval", seconds, "search", "l3")
        service.metrics.count("redismem_requests", "search", "ok")


class Mortal:
    """A Redis that stops and comes back at the same place, empty."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, AsyncExitStack()
        self.url = EmbeddedRedis(folder).url

    async def start(self) -> None:
        await self._stack.enter_async_context(EmbeddedRedis(self._folder, persist=False))

    async def stop(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[Mortal]:
    redis = Mortal(tmp_path)
    await redis.start()
    yield redis
    await redis.stop()


@pytest.fixture
async def lone(mortal: Mortal) -> AsyncIterator[Service]:
    """A service on a Redis that may stop."""
    settings = Settings(
        redis_url=mortal.url, embedder="deterministic", testing=True, redis_timeout_s=1, l1_entries=0
    )
    async with open_service(settings) as opened:
        yield opened


async def _answers(service: Service) -> bool:
    with suppress(RedisUnavailable):
        return bool(await service.client.execute("PING"))
    return False


async def _saved(service: Service) -> bool:
    with suppress(RedisUnavailable):
        await service.telemetry.save()
        return True
    return False


async def test_what_could_not_be_added_is_added_later_and_once(lone: Service, mortal: Mortal) -> None:
    ask(lone, 5)
    await mortal.stop()
    for _ in range(3):
        with pytest.raises(RedisUnavailable):
            await lone.telemetry.save()
        ask(lone, 1)
    await mortal.start()
    await until("it is added", lambda: _saved(lone))
    await lone.telemetry.save()
    assert await kept(lone) == {"retrieval:search:l3:50": 8, "requests:search:ok": 8}


async def test_what_is_shown_while_redis_is_away_is_what_was_read_last(lone: Service, mortal: Mortal) -> None:
    ask(lone, 5)
    await lone.telemetry.save()
    await lone.telemetry.look()
    before = await lone.overview.dashboard()
    assert (before.latency.hour.count, before.redis is None, before.worker is None) == (5, False, False)
    await mortal.stop()
    await lone.telemetry.look()
    await until("another read is due", lambda: asyncio.sleep(0, time.time() > before.at.timestamp() + 1.1))
    shown, slo = await lone.overview.dashboard(), await lone.overview.slo()
    assert (shown.latency.hour.count, shown.redis, shown.worker) == (5, None, None)
    assert slo.objectives == before.slo
    assert slo.at.timestamp() <= before.at.timestamp()
    assert b"redismem_redis_up 0.0" in lone.metrics.exposition()
    await mortal.start()
    await until("Redis answers", lambda: _answers(lone))
    await lone.telemetry.look()
    assert (await lone.overview.dashboard()).redis is not None
    assert b"redismem_redis_up 1.0" in lone.metrics.exposition()


async def test_nothing_is_shown_where_nothing_was_ever_read(lone: Service, mortal: Mortal) -> None:
    await mortal.stop()
    for document in (lone.overview.slo, lone.overview.dashboard):
        with pytest.raises(RedisUnavailable):
            await document()


async def test_what_was_counted_by_the_end_is_added_at_the_end(tiered: Service) -> None:
    running = asyncio.create_task(tiered.telemetry.run())
    await until("it runs", lambda: asyncio.sleep(0, tiered.telemetry.store is not None))
    ask(tiered, 3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await kept(tiered))["requests:search:ok"] == 3


async def test_the_end_does_not_wait_for_a_redis_that_is_away(lone: Service, mortal: Mortal) -> None:
    running = asyncio.create_task(lone.telemetry.run())
    await until("it runs", lambda: asyncio.sleep(0, lone.telemetry.store is not None))
    await mortal.stop()
    ask(lone, 3)
    began_s = time.monotonic()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert time.monotonic() - began_s < 5


async def test_processes_add_up_and_each_shows_the_sum(tiered: Service) -> None:
    settings = replace(tiered.settings, l1_entries=10)
    async with assembled(settings, tiered.client, tiered.embedder) as other:
        for one, times in ((tiered, 3), (other, 4), (tiered, 5)):
            ask(one, times)
            await one.telemetry.save()
        for one in (tiered, other):
            assert (await one.overview.dashboard()).latency.hour.count == 12
        await until("both have a lease", lambda: asyncio.sleep(0, other.coherence.is_live()))
        await tiered.telemetry.look()
        assert (await tiered.overview.dashboard()).processes == 2


async def test_a_worker_tells_its_jobs_and_no_requests(tiered: Service) -> None:
    tiered.telemetry.serves = False
    tiered.worker.counts.update({"profile done": 2, "topics retried": 1, "topics dead": 1})
    ask(tiered, 1)
    running = asyncio.create_task(tiered.telemetry.run())
    await until(
        "it was counted",
        lambda: asyncio.sleep(0, b'redismem_jobs_done_total{kind="profile"' in tiered.metrics.exposition()),
    )
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    text = tiered.metrics.exposition().decode()
    for kind, outcome, count in (("profile", "done", 2), ("topics", "retried", 1), ("topics", "dead", 1)):
        assert f'redismem_jobs_done_total{{kind="{kind}",outcome="{outcome}"}} {count}.0' in text
    assert "redismem_processes 1.0" not in text
    assert await kept(tiered) == Counter()


async def test_a_blocked_event_loop_is_seen(tiered: Service) -> None:
    running = asyncio.create_task(tiered.telemetry.run())
    await until("it runs", lambda: asyncio.sleep(0, tiered.telemetry.store is not None))
    await asyncio.to_thread(lambda: None)
    time.sleep(0.8)  # noqa: ASYNC251  # this is what must be seen
    observed: Counter[str] = Counter()

    async def lag() -> bool:
        counts = (
            tiered.metrics._taken[0].get(("lag", ()), [0.0]),
            tiered.metrics._observed.get(("lag", ()), [0.0]),
        )
        observed["lag"] = int(1000 * sum(one[-1] for one in counts))
        return observed["lag"] >= 400

    await until("the lag was counted", lag)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_defect_in_counting_ends_nothing(tiered: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    async def broken() -> None:
        nonlocal looks
        looks += 1
        raise ValueError("a defect")

    monkeypatch.setattr(tiered.telemetry, "_sample", broken)
    monkeypatch.setattr("redismem.telemetry._SAMPLE_S", 0.01)
    running = asyncio.create_task(tiered.telemetry.run())
    await until("it looked again", lambda: asyncio.sleep(0, looks > 2))
    await until("the store was seen", lambda: asyncio.sleep(0, tiered.telemetry.store is not None))
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_store_is_told_as_maintenance_counted_it(tiered: Service) -> None:
    for user, count in (("ada", 3), ("ben", 2)):
        memories = [MemoryInput(text=f"memory {i}") for i in range(count)]
        await tiered.writer.put(tiered.owner(user), memories)
    await tiered.maintenance.round()
    await tiered.telemetry.look()
    store, queue = tiered.telemetry.store, tiered.telemetry.queue
    assert store is not None
    assert queue is not None
    assert (store.users, store.vectors, store.graphs, store.parked) == (2, 5, 0, 0)
    assert store.memory_bytes > 1_000_000
    assert store.index_bytes > 0
    assert queue.waiting + queue.due > 0
    text = tiered.metrics.exposition().decode()
    for line in ("index_size_vectors 5.0", "redismem_users 2.0", "redismem_redis_up 1.0"):
        assert line in text
    assert f'redismem_jobs{{state="waiting"}} {float(queue.waiting)}' in text


async def test_evictions_reach_the_history(tiered: Service) -> None:
    settings = replace(tiered.settings, l1_entries=5)
    async with assembled(settings, tiered.client, tiered.embedder) as small:
        await until("the lease is held", lambda: asyncio.sleep(0, small.coherence.is_live()))
        owner = small.owner("ada")
        await small.writer.put(owner, [MemoryInput(text="likes tea")])
        await small.coherence.barrier({})
        for i in range(20):
            await small.tiers.search(owner, SearchRequest(text=f"tea {i}", search_mode="keyword"))
        await small.telemetry.save()
        evicted = small.l1.stats()["search"]["evictions"]
        assert evicted >= 10
        assert (await kept(small))["evictions:l1_search"] == evicted
        assert (await small.overview.dashboard()).cache.evictions_hour >= evicted


async def test_what_goes_on_for_all_requests_is_not_counted_to_the_first(tiered: Service) -> None:
    """Under load it never ends: with OpenTelemetry the spans of that trace would grow for ever."""
    owner = tiered.owner("ada")
    await tiered.writer.put(owner, [MemoryInput(text="likes tea", id="m1")])
    first = Trace("search", "r1", spans=[])
    token = current.set(first)
    tiered.touches.add(owner, ["m1"])
    current.reset(token)
    await until("the touch is counted", lambda: tiered.client.execute("HGET", owner.hits, "m1"))
    assert (first.round_trips, first.spans) == (0, [])


def test_the_history_keeps_what_promises_are_judged_by_and_no_more() -> None:
    metrics = Metrics()
    for name, labels in (
        ("retrieval", ("search", "l1")),
        ("retrieval", ("list", "none")),
        ("context", ("context",)),
        ("update", ("put",)),
    ):
        for seconds in (0.0, 0.1, 50.0):
            metrics.observe(name, seconds, *labels)  # type: ignore[arg-type]  # each is a histogram
    metrics.observe("trips", 1.0, "search")
    metrics.observe("lag", 0.1)
    metrics.count("redismem_requests", "search", "failed", by=4)
    metrics.count("redismem_cache_evictions", "l1_search", by=7)
    metrics.count("redismem_refused", "key")
    assert history(*metrics.taken()) == {
        **{f"retrieval:search:l1:{bucket}": 1 for bucket in ("10", "100", "inf")},
        **{f"retrieval:list:none:{bucket}": 1 for bucket in ("10", "100", "inf")},
        **{f"context:context:none:{bucket}": 1 for bucket in ("10", "100", "inf")},
        **{f"update:put:none:{bucket}": 1 for bucket in ("10", "100", "inf")},
        "requests:search:failed": 4,
        "evictions:l1_search": 7,
    }
    metrics.observe("retrieval", 0.5, "search", "l2")
    assert all(parts_of(name) for name in history(*metrics.taken()))
