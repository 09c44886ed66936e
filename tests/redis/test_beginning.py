"""Warming of a user whose session begins: in the background, once, bounded, without effect where it fails."""

from __future__ import annotations

import asyncio

import pytest

from redismem import warm
from redismem.client import Client
from redismem.keys import Owner
from redismem.service import Service
from redismem.settings import Settings
from redismem.types import MemoryInput
from redismem.warm import Warmer
from tests.conftest import until
from tests.redis.test_context_assembly import sent
from tests.redis.test_warm import warmer_of

assert sent  # a fixture


async def ended(warmer: Warmer) -> None:
    await until("nobody is warmed", lambda: asyncio.sleep(0, not warmer._beginning))


async def test_who_begins_is_warm_and_has_an_index_again(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(owner, [MemoryInput(id="a", text="one")])
    assert await tiered.indexes.park(owner, 4e9)
    warmer = warmer_of(tiered, 0)
    warmer.begin(owner)
    assert tiered.tiers.known_memory(owner, "a") is None  # not at once
    await ended(warmer)
    assert tiered.tiers.known_memory(owner, "a") is not None
    assert await tiered.client.execute("HGET", owner.meta, "index_state") != b"cold"


async def test_who_begins_twice_is_warmed_once_at_a_time(
    tiered: Service, owner: Owner, sent: list[str]
) -> None:
    await tiered.writer.put(owner, [MemoryInput(id="a", text="one")])
    warmer = warmer_of(tiered, 0)
    sent.clear()
    for _ in range(5):
        warmer.begin(owner)
    await ended(warmer)
    assert sent.count("HGET") == 1
    warmer.begin(owner)
    await ended(warmer)
    assert sent.count("HGET") == 2


async def test_of_many_who_begin_at_once_some_stay_cold(
    tiered: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "MOST_BEGINNING", 2)
    owners = [Owner(f"u{i}") for i in range(3)]
    for owner in owners:
        await tiered.writer.put(owner, [MemoryInput(id="a", text="one")])
    warmer = warmer_of(tiered, 0)
    for owner in owners:
        warmer.begin(owner)
    await ended(warmer)
    assert [tiered.tiers.known_memory(one, "a") is not None for one in owners] == [True, True, False]


async def test_nobody_and_a_redis_that_is_away_are_no_error(
    tiered: Service, owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = Client(Settings(), "redis://127.0.0.1:1")
    away = Warmer(nowhere, tiered.indexes, tiered.tiers, tiered.coherence, tiered.embedder, users=0)
    for warmer in (warmer_of(tiered, 0), away):
        warmer.begin(owner)
        await ended(warmer)
    assert [row for row in caplog.records if row.levelname in ("WARNING", "ERROR")] == []
    await nowhere.close()


async def test_closing_ends_what_was_begun(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(owner, [MemoryInput(id="a", text="one")])
    warmer = warmer_of(tiered, 0)
    warmer.begin(owner)
    await warmer.close()
    await ended(warmer)
    assert tiered.tiers.known_memory(owner, "a") is None
