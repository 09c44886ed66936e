"""API keys on a real server, seen by two services: with an L1 and without."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from redismem.apikeys import KeyTable
from redismem.client import Client
from redismem.coherence import Coherence
from redismem.embedded import EmbeddedRedis
from redismem.errors import Conflict, InvalidInput, NotFound, RedisUnavailable, StoreError
from redismem.keyring import KeyRing
from redismem.keys import API_KEYS
from redismem.l1 import L1
from redismem.service import Service
from redismem.settings import Settings
from tests.conftest import until
from tests.redis.conftest import Counter


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[KeyRing]:
    """A key ring with connections, L1 and lease of its own, as every process has them."""
    async with AsyncExitStack() as stack:
        client = Client(settings, settings.redis_url)
        stack.push_async_callback(client.close)
        l1 = L1(max_entries=settings.l1_entries, max_bytes=settings.l1_bytes)
        has_l1 = settings.l1_entries > 0
        coherence = Coherence(
            client, l1, lease_s=settings.lease_s, keep_when_lost=settings.stale_if_error, answers=has_l1
        )
        coherence.start()
        stack.push_async_callback(coherence.close)
        await asyncio.wait_for(coherence.lived(), 10)
        yield KeyRing(client, l1, coherence, settings)


@pytest.fixture
def cached(settings: Settings) -> Settings:
    return replace(settings, l1_entries=1000)


@pytest.fixture
async def rings(service: Service, cached: Settings) -> AsyncIterator[list[KeyRing]]:
    """Two processes with an L1, one without; all audited by `service`."""
    async with opened(cached) as one, opened(cached) as other, opened(service.settings) as bare:
        yield [one, other, bare]


async def known(ring: KeyRing) -> KeyTable:
    """Return the table once L1 has it."""

    async def loaded() -> bool:
        await ring.table()
        return ring.known() is not None

    await until("L1 has the keys", loaded)
    table = ring.known()
    assert table is not None
    return table


async def test_a_store_without_keys_is_empty_for_everyone(rings: list[KeyRing]) -> None:
    assert [(await ring.table()).is_empty for ring in rings] == [True] * 3
    assert (await known(rings[0])).is_empty


async def test_a_created_key_is_known_to_every_process_when_create_returns(rings: list[KeyRing]) -> None:
    for ring in rings[:2]:
        assert (await known(ring)).is_empty
    key, token = await rings[0].create(name="agent", scopes=["read"])
    assert [(await ring.table()).holder(token) for ring in rings] == [key] * 3


async def test_neither_create_nor_revoke_returns_before_a_process_whose_pushes_are_late_knows_of_it(
    rings: list[KeyRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rings[1]._coherence, "_invalidated", lambda _: None)
    assert (await known(rings[1])).is_empty
    key, token = await rings[0].create(name="agent", scopes=["read"])
    assert rings[1].known() is None
    assert (await known(rings[1])).holder(token) == key
    await rings[0].revoke(key.id)
    assert rings[1].known() is None
    assert (await rings[1].table()).holder(token) is None


async def test_a_revoked_key_is_refused_by_every_process_when_revoke_returns(rings: list[KeyRing]) -> None:
    key, token = await rings[0].create(name="agent", scopes=["read"])
    for _ in range(20):
        for ring in rings[:2]:
            assert (await known(ring)).holder(token) == key
        await rings[2].revoke(key.id)
        for ring in rings[:2]:
            assert ring.known() is None
        assert [(await ring.table()).holder(token) for ring in rings] == [None] * 3
        key, token = await rings[1].create(name="agent", scopes=["read"])


async def test_requests_that_never_stop_see_no_revoked_key_after_the_revocation(rings: list[KeyRing]) -> None:
    """The hot path of a process under load, against the moment another process's revoke returns."""
    gone: set[str] = set()
    tokens: list[str] = []
    wrong, accepted = [], 0

    async def requests(ring: KeyRing) -> None:
        nonlocal accepted
        while True:
            for token in tokens[-2:]:
                was_gone = token in gone
                table = ring.known() or await ring.table()
                if table.holder(token) is not None:
                    accepted += 1
                    wrong.extend([token] if was_gone else [])
            await asyncio.sleep(0)

    asking = [asyncio.create_task(requests(ring)) for ring in rings for _ in range(3)]
    try:
        for _ in range(50):
            key, token = await rings[0].create(name="agent", scopes=["read"])
            tokens.append(token)
            await rings[0].revoke(key.id)
            gone.add(token)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    assert accepted > 0
    assert wrong == []


async def test_revoking_the_last_key_does_not_open_the_service(rings: list[KeyRing]) -> None:
    key, _ = await rings[0].create(name="agent", scopes=["admin"])
    shown = await rings[0].revoke(key.id)
    assert shown.revoked_at is not None
    assert [(await ring.table()).is_empty for ring in rings] == [False] * 3


async def test_a_key_is_revoked_once_and_its_moment_stays(rings: list[KeyRing]) -> None:
    key, _ = await rings[0].create(name="agent", scopes=["read"])
    first = await rings[0].revoke(key.id)
    assert await rings[1].revoke(key.id) == first


async def test_an_unknown_key_cannot_be_revoked(rings: list[KeyRing]) -> None:
    for name in ("0" * 12, "", "*", "ä"):
        with pytest.raises(NotFound):
            await rings[0].revoke(name)
    assert await rings[0].listed() == []


async def test_a_key_of_a_newer_version_is_not_rewritten_by_this_one(rings: list[KeyRing]) -> None:
    key, token = await rings[0].create(name="agent", scopes=["read"])
    body = msgspec.json.encode({**msgspec.to_builtins(key), "hours": "9-17"})
    await rings[0]._client.execute("HSET", API_KEYS, key.id, body)
    with pytest.raises(Conflict):
        await rings[0].revoke(key.id)
    assert await rings[0]._client.execute("HGET", API_KEYS, key.id) == body
    await until("the push came", lambda: lacks(rings[1], token))


async def lacks(ring: KeyRing, token: str) -> bool:
    return (await ring.table()).holder(token) is None


async def test_what_another_hand_writes_is_seen_without_a_barrier(rings: list[KeyRing]) -> None:
    _, token = await rings[0].create(name="agent", scopes=["read"])
    await known(rings[1])
    await rings[0]._client.execute("DEL", API_KEYS)
    await until("the push came", lambda: lacks(rings[1], token))


async def test_the_list_shows_all_keys_in_their_order_without_digests(rings: list[KeyRing]) -> None:
    for name in ("a", "b", "c"):
        await rings[0].create(
            name=name, scopes=["write"], namespace="n", users=["ada"], rate_per_s=5, burst=7
        )
    listed = await rings[2].listed()
    assert [key.name for key in listed] == ["a", "b", "c"]
    shown = msgspec.to_builtins(listed[0])
    assert "digest" not in shown
    assert (shown["namespace"], shown["users"], shown["rate_per_s"], shown["burst"]) == ("n", ("ada",), 5, 7)


async def test_a_refused_key_is_not_stored(rings: list[KeyRing]) -> None:
    with pytest.raises(InvalidInput):
        await rings[0].create(name="", scopes=["read"])
    assert (await rings[0].table()).is_empty


async def test_redis_holds_neither_secret_nor_token(rings: list[KeyRing]) -> None:
    _, token = await rings[0].create(name="agent", scopes=["read"])
    flat = await rings[0]._client.execute("HGETALL", API_KEYS)
    assert token.split("_", 2)[2].encode() not in b"".join(flat)


async def test_a_known_table_costs_no_round_trip_and_an_unknown_one_costs_one(
    tiered: Service, round_trips: Counter
) -> None:
    ring = KeyRing(tiered.client, tiered.l1, tiered.coherence, tiered.settings)
    with round_trips() as sent:
        await asyncio.gather(*[ring.table() for _ in range(20)])
        await ring.table()
    assert sent == ["HGETALL"]


async def test_a_reading_that_a_change_overtook_is_neither_kept_nor_joined(
    rings: list[KeyRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, token = await rings[0].create(name="agent", scopes=["read"])
    execute, answered, go_on = Client.execute, asyncio.Event(), asyncio.Event()

    async def late(self: Client, *command: Any) -> Any:
        reply = await execute(self, *command)
        if command[0] == "HGETALL" and not answered.is_set():
            answered.set()
            await go_on.wait()
        return reply

    monkeypatch.setattr(Client, "execute", late)
    slow = asyncio.create_task(rings[1].table())
    await answered.wait()
    await rings[0].revoke(key.id)
    assert (await asyncio.wait_for(rings[1].table(), 10)).holder(token) is None
    go_on.set()
    assert (await slow).holder(token) == key  # it asked before the revocation
    assert (await rings[1].table()).holder(token) is None


async def test_a_caller_who_leaves_does_not_take_the_others_along(
    rings: list[KeyRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, asked = Client.execute, asyncio.Event()

    async def never(self: Client, *command: Any) -> Any:
        if command[0] == "HGETALL" and not asked.is_set():
            asked.set()
            await asyncio.Event().wait()
        return await execute(self, *command)

    monkeypatch.setattr(Client, "execute", never)
    await until("the lease is held", lambda: asyncio.sleep(0, rings[0]._coherence.is_live()))
    first = asyncio.create_task(rings[0].table())
    await asked.wait()
    second = asyncio.create_task(rings[0].table())
    await asyncio.sleep(0)
    first.cancel()
    assert (await asyncio.wait_for(second, 10)).is_empty


async def test_another_type_in_the_place_of_the_keys_lets_nobody_in(rings: list[KeyRing]) -> None:
    await rings[0]._client.execute("SET", API_KEYS, "x")
    await rings[1]._coherence.barrier({})
    for ring in rings:
        with pytest.raises(StoreError):
            await ring.table()


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server that the test may stop."""
    async with EmbeddedRedis(tmp_path, persist=False) as redis:
        yield redis
        if redis.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(redis.pid, signal.SIGCONT)


@pytest.mark.parametrize("stale", [True, False])
async def test_while_redis_is_away_the_known_keys_serve_only_with_stale_if_error(
    mortal: EmbeddedRedis, cached: Settings, stale: bool
) -> None:
    settings = replace(cached, redis_url=mortal.url, redis_timeout_s=0.3, stale_if_error=stale)
    async with opened(settings) as ring:
        key, token = await ring.create(name="agent", scopes=["read"])
        await known(ring)
        assert mortal.pid is not None
        os.kill(mortal.pid, signal.SIGSTOP)
        await until("the lease ran out", lambda: asyncio.sleep(0, ring.known() is None))
        if stale:
            assert (await ring.table()).holder(token) == key
        else:
            with pytest.raises(RedisUnavailable):
                await ring.table()


async def test_keys_that_were_never_read_are_no_keys_while_redis_is_away(
    mortal: EmbeddedRedis, cached: Settings
) -> None:
    settings = replace(cached, redis_url=mortal.url, redis_timeout_s=0.3, stale_if_error=True)
    async with opened(settings) as ring:
        assert mortal.pid is not None
        os.kill(mortal.pid, signal.SIGSTOP)
        with pytest.raises(RedisUnavailable):
            await ring.table()
