"""Warming: the most recently active users first, their hot memories in L1, readiness behind it."""

from __future__ import annotations

import asyncio

import httpx

from redismem import warm
from redismem.http.app import create_app
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput
from redismem.warm import Warmer


def warmer_of(service: Service, users: int) -> Warmer:
    return Warmer(
        service.client, service.indexes, service.tiers, service.coherence, service.embedder, users=users
    )


async def users(service: Service, count: int) -> list[Owner]:
    """Users, the later the more recently active."""
    owners = [service.owner(f"u{number}") for number in range(count)]
    for number, owner in enumerate(owners):
        await service.writer.put(owner, [MemoryInput(id="a", text="one"), MemoryInput(id="b", text="two")])
        await service.client.execute("HSET", owner.meta, "last_activity", 1000 + number)
    return owners


async def test_the_most_recently_active_are_warm(tiered: Service) -> None:
    owners = await users(tiered, 6)
    await tiered.client.execute("HSET", owners[0].meta, "last_read", 5000)
    warmer = warmer_of(tiered, 3)
    await warmer.start()
    assert (warmer.is_ready, warmer.warmth.done, warmer.warmth.of) == (True, 3, 3)
    known = [tiered.tiers.known_memory(owner, "a") is not None for owner in owners]
    assert known == [True, False, False, False, True, True]


async def test_hot_memories_are_warmed_beside_the_newest(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(
        owner, [MemoryInput(id=f"m{i}", text=f"text {i}") for i in range(warm.NEWEST + 5)]
    )
    assert await tiered.warmer.warm(owner) == warm.NEWEST
    tiered.touches.add(owner, ["m0", "m1"])
    await tiered.touches.flush()
    assert await tiered.warmer.warm(owner) == warm.NEWEST + 2
    assert tiered.tiers.known_memory(owner, "m0") is not None


async def test_a_delete_holds_against_warming(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(owner, [MemoryInput(id="a", text="one")])
    await tiered.warmer.warm(owner)
    await asyncio.gather(
        tiered.warmer.warm(owner), tiered.writer.delete(owner, "a"), tiered.warmer.warm(owner)
    )
    assert tiered.tiers.known_memory(owner, "a") is None


async def test_parked_users_stay_parked(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(owner, [MemoryInput(id="a", text="one")])
    assert await tiered.indexes.park(owner, 4e9)
    assert await tiered.warmer.warm(owner) == 0
    assert await tiered.client.execute("HGET", owner.meta, "index_state") == b"cold"


async def test_ready_waits_for_warming_and_says_how_far_it_is(tiered: Service) -> None:
    transport = httpx.ASGITransport(app=create_app(tiered))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        tiered.warmer.is_ready = False
        tiered.warmer.warmth = warm.Warmth(done=1, of=4)
        reply = await http.get("/health/ready")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json() == {"status": "warming", "warm": {"done": 1, "of": 4}}
        assert (await http.get("/health/live")).status_code == 200
        tiered.warmer.is_ready = True
        assert (await http.get("/health/ready")).json() == {"status": "ok", "warm": {"done": 1, "of": 4}}


async def test_a_store_that_cannot_be_warmed_serves_all_the_same(
    tiered: Service, monkeypatch: object
) -> None:
    monkeypatch.setattr(warm, "PATIENCE_S", 0.0)  # type: ignore[attr-defined]
    await users(tiered, 2)
    warmer = warmer_of(tiered, 5)
    await warmer.start()
    assert warmer.is_ready
