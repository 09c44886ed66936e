"""Touches: counted in the process, sent once a second, never in the way of a read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from redismem import touches as module
from redismem.errors import RedisUnavailable, StoreError
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.service import Service
from redismem.touches import Touches
from redismem.types import MemoryInput


class Recorded(Functions):
    """Functions that note what is sent, and fail or hang when told."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.client)
        self.sent: list[list[Any]] = []
        self.error: Exception | None = None
        self.hangs = False

    async def call_each(self, name: str, calls: Sequence[Any], *, read: bool = False) -> list[Any]:
        self.sent.append(list(calls))
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return await super().call_each(name, calls, read=read)


@pytest.fixture
async def functions(service: Service, owner: Owner) -> Recorded:
    await service.writer.put(owner, [MemoryInput(id=one, text=one) for one in ("a", "b", "c")])
    return Recorded(service)


@pytest.fixture
async def touches(functions: Recorded) -> AsyncIterator[Touches]:
    touches = Touches(functions, capacity=2, ttl_s=60, clock=lambda: 1_800_000_000.0)
    yield touches
    await touches.close()


async def hits(service: Service, owner: Owner) -> dict[bytes, int]:
    flat = await service.client.execute("HGETALL", owner.hits)
    return dict(zip(flat[::2], map(int, flat[1::2]), strict=True))


async def test_results_become_counts_of_memories(
    service: Service, owner: Owner, functions: Recorded, touches: Touches
) -> None:
    touches.add(owner, ["a", "b"])
    touches.add(owner, ("a", "b"), 4)
    touches.add(owner, ["a"])
    touches.add(owner, [])
    await touches.flush()
    assert await hits(service, owner) == {b"a": 6, b"b": 5}
    assert await service.client.execute("ZSCORE", owner.hot, "a") == b"1800000000000"
    assert 59_000 < await service.client.execute("PTTL", owner.hot) <= 60_000
    await touches.flush()
    assert len(functions.sent) == 1  # nothing to send, nothing sent


async def test_the_hot_set_keeps_to_its_capacity(service: Service, owner: Owner, touches: Touches) -> None:
    touches.add(owner, ["a", "c"], 2)
    touches.add(owner, ["b"])
    await touches.flush()
    assert await hits(service, owner) == {b"a": 2, b"c": 2}


async def test_many_go_a_few_at_a_time_so_that_reads_go_between(
    service: Service, owner: Owner, functions: Recorded, touches: Touches, round_trips: Any
) -> None:
    other, third = service.owner("bob"), service.owner("eve")
    touches.add(owner, [f"m{number}" for number in range(210)])
    touches.add(other, ["a"])
    touches.add(third, [f"m{number}" for number in range(95)])
    with round_trips() as sent:
        await touches.flush()
    assert len(sent) == 4
    sizes = [[(keys[0], (len(args) - 4) // 2) for keys, args in calls] for calls in functions.sent]
    assert sizes == [
        [(owner.hot, 100)],
        [(owner.hot, 100)],
        [(owner.hot, 10), (other.hot, 1)],
        [(third.hot, 95)],
    ]


async def test_a_user_whose_touches_are_refused_costs_others_nothing(
    service: Service, owner: Owner, touches: Touches
) -> None:
    other = service.owner("bob")
    await service.client.execute("SET", other.hot, "by a foreign hand", "EX", 60)
    for one in (other, owner):
        touches.add(one, ["a"])
        touches.add(one, [f"m{number}" for number in range(99)])
    await touches.flush()
    assert (await hits(service, owner)) == {b"a": 1}


async def test_what_is_added_is_sent_within_seconds(
    service: Service, owner: Owner, touches: Touches, until: Any
) -> None:
    touches.add(owner, ["a"])

    async def counted() -> bool:
        return await hits(service, owner) == {b"a": 1}

    await until("the touch is counted", counted)
    await until("the task has ended", lambda: ended(touches))
    touches.add(owner, ["a"])  # and starts again
    await touches.close()
    assert await hits(service, owner) == {b"a": 2}


async def ended(touches: Touches) -> bool:
    return touches._task is None


@pytest.mark.parametrize("error", [RedisUnavailable("away"), StoreError("RMEM_TYPE")])
async def test_a_failure_drops_the_batch_and_nothing_else(
    service: Service, owner: Owner, functions: Recorded, touches: Touches, error: Exception
) -> None:
    functions.error = error
    touches.add(owner, ["a"])
    await touches.flush()
    functions.error = None
    touches.add(owner, ["b"])
    await touches.flush()
    assert await hits(service, owner) == {b"b": 1}


async def test_pending_results_are_bounded(
    owner: Owner, functions: Recorded, touches: Touches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    for one in ("a", "b", "c", "a"):
        touches.add(owner, [one])
    await touches.flush()
    [(_, args)] = functions.sent[0]
    assert args[4:] == ["a", 2, "b", 1]


async def test_closing_sends_the_last_and_takes_no_more(
    service: Service, owner: Owner, functions: Recorded, touches: Touches
) -> None:
    touches.add(owner, ["a"])
    await touches.close()
    assert await hits(service, owner) == {b"a": 1}
    touches.add(owner, ["b"])
    await touches.close()
    assert len(functions.sent) == 1


async def test_closing_does_not_wait_for_a_redis_that_hangs(
    owner: Owner, functions: Recorded, touches: Touches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_EVERY_S", 0.05)
    functions.hangs = True
    touches.add(owner, ["a"])
    await asyncio.wait_for(touches.close(), 5)
    assert len(functions.sent) == 1
