"""Several processes' worth of L1 on one Redis: what one changes, no other answers from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from redismem.client import Client
from redismem.coherence import Coherence, has_forgotten
from redismem.keys import COHERENCE_CHANNEL, LEASES, Owner
from redismem.service import Service, assembled
from redismem.settings import MAX_LEASE_S, Settings
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchRequest
from tests.redis.conftest import Until

TEA = SearchRequest(text="tea")


@pytest.fixture
async def fleet(tiered: Service, until: Until) -> AsyncIterator[list[Service]]:
    """Three services with a connection of their own each."""
    async with AsyncExitStack() as stack:
        services = [tiered]
        for _ in range(2):
            client = Client(tiered.settings, tiered.client.url)
            stack.push_async_callback(client.close)
            services.append(
                await stack.enter_async_context(assembled(tiered.settings, client, tiered.embedder))
            )
        for service in services:
            await live(service.coherence, until)
        yield services


async def live(coherence: Coherence, until: Until) -> None:
    await until("L1 may answer", lambda: asyncio.sleep(0, coherence.is_live()))


async def warm(services: list[Service], owner: Owner, until: Until) -> None:
    """Bring the search and the memory `a` into every L1."""

    async def known(service: Service) -> bool:
        await service.tiers.search(owner, TEA)
        await service.tiers.memory(owner, "a")
        return bool(service.tiers.known_search(owner, TEA) and service.tiers.known_memory(owner, "a"))

    for service in services:
        await until("L1 has it", lambda service=service: known(service))  # type: ignore[misc]


def knows(service: Service, owner: Owner) -> list[bool]:
    """Whether L1 has the search and the memory."""
    return [
        service.tiers.known_search(owner, TEA) is not None,
        service.tiers.known_memory(owner, "a") is not None,
    ]


async def test_a_delete_is_acknowledged_when_no_process_knows_the_memory(
    fleet: list[Service], owner: Owner, until: Until
) -> None:
    await fleet[0].writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await warm(fleet, owner, until)
    await fleet[0].writer.delete(owner, "a")
    assert [knows(service, owner) for service in fleet] == [[False, False]] * 3


async def test_a_correction_and_a_forgetting_hold_everywhere_too(
    fleet: list[Service], owner: Owner, until: Until
) -> None:
    await fleet[0].writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await warm(fleet, owner, until)
    correction = CorrectionRequest(ids=["a"], memory=MemoryInput(text="likes tea with milk"))
    await fleet[1].writer.correct(owner, correction)
    assert not any(service.tiers.known_memory(owner, "a") for service in fleet)
    await warm(fleet, owner, until)
    await fleet[2].writer.forget(owner)
    assert [knows(service, owner) for service in fleet] == [[False, False]] * 3


async def test_a_strong_update_waits_for_the_others_and_a_plain_one_only_drops_here(
    fleet: list[Service], owner: Owner, until: Until
) -> None:
    await fleet[0].writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    for strong in (True, False):
        await warm(fleet, owner, until)
        barriers = fleet[0].coherence.counts["barriers"]
        await fleet[0].writer.update(owner, "a", MemoryPatch(text=f"likes tea: {strong}"), strong=strong)
        assert fleet[0].coherence.counts["barriers"] == barriers + strong
        assert knows(fleet[0], owner) == [False, False]
        if strong:
            assert [knows(service, owner) for service in fleet] == [[False, False]] * 3


async def test_what_another_hand_writes_leaves_every_l1(
    fleet: list[Service], owner: Owner, until: Until
) -> None:
    await fleet[0].writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await warm(fleet, owner, until)
    await fleet[0].client.execute("HSET", owner.memory("a"), "text", "likes tea and cake")
    for service in fleet:
        await until(
            "the push has come",
            lambda service=service: asyncio.sleep(0, knows(service, owner) == [False, False]),  # type: ignore[misc]
        )


async def test_a_flushed_database_leaves_nothing_in_l1_and_service_goes_on(
    tiered: Service, owner: Owner, until: Until
) -> None:
    await tiered.writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await warm([tiered], owner, until)
    await tiered.client.execute("FLUSHALL")
    await until("the flush has come", lambda: asyncio.sleep(0, tiered.coherence.counts["flushes"] > 0))
    assert knows(tiered, owner) == [False, False]
    await live(tiered.coherence, until)
    assert tiered.coherence.id.encode() in await tiered.client.execute("HKEYS", LEASES)


async def test_a_killed_push_connection_bypasses_l1_until_a_new_one_stands(
    tiered: Service, owner: Owner, until: Until
) -> None:
    await tiered.writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await warm([tiered], owner, until)
    connections = tiered.coherence.counts["connections"]
    await tiered.client.execute("CLIENT", "KILL", "TYPE", "PUBSUB")
    await until("it is noticed", lambda: asyncio.sleep(0, not tiered.coherence.is_live()))
    await live(tiered.coherence, until)
    assert tiered.coherence.counts["connections"] == connections + 1
    assert knows(tiered, owner) == [False, False]


async def test_the_lease_runs_out_without_heartbeats(
    tiered: Service, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    execute = Client.execute

    async def mute(self: Client, *command: object) -> object:
        if command[0] == "EVAL":
            await asyncio.sleep(3600)
        return await execute(self, *command)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "execute", mute)
    assert tiered.coherence.is_live()
    await until("the lease has run out", lambda: asyncio.sleep(0, not tiered.coherence.is_live()))
    assert tiered.coherence.is_listening


async def test_a_silent_process_is_waited_for_until_it_is_forgotten(
    tiered: Service, owner: Owner, until: Until
) -> None:
    await tiered.writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await tiered.client.execute("HSET", LEASES, "silent", "")
    await tiered.client.execute("HPEXPIRE", LEASES, 300, "FIELDS", 1, "silent")
    await tiered.writer.delete(owner, "a")
    assert await tiered.client.execute("HEXISTS", LEASES, "silent") == 0
    assert tiered.coherence.counts["barrier_timeouts"] == 0


async def test_a_barrier_ends_when_every_lease_of_before_has_run_out(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(owner, [MemoryInput(text="likes tea", id="a")])
    await tiered.client.execute("HSET", LEASES, "silent for ever", "")
    await tiered.client.execute("HPEXPIRE", LEASES, 60_000, "FIELDS", 1, "silent for ever")
    started = asyncio.get_running_loop().time()
    await tiered.writer.delete(owner, "a")
    assert asyncio.get_running_loop().time() - started >= MAX_LEASE_S
    assert tiered.coherence.counts["barrier_timeouts"] == 1
    await tiered.client.execute("HDEL", LEASES, "silent for ever")


async def test_barriers_of_one_process_go_out_together(fleet: list[Service], owner: Owner) -> None:
    ids = [str(number) for number in range(40)]
    await fleet[0].writer.put(owner, [MemoryInput(text=f"tea {i}", id=i) for i in ids])
    before = (await fleet[0].client.execute("INFO", "commandstats")).decode()
    await asyncio.gather(*(fleet[0].writer.delete(owner, i) for i in ids))
    after = (await fleet[0].client.execute("INFO", "commandstats")).decode()

    def evals(info: str) -> int:
        line = next((line for line in info.splitlines() if line.startswith("cmdstat_eval:")), "calls=0,")
        return int(line.partition("calls=")[2].partition(",")[0])

    assert evals(after) - evals(before) < len(ids) / 2


async def test_a_repeated_strong_write_waits_like_the_first(tiered: Service, owner: Owner) -> None:
    for outcome in ("CREATED", "UNCHANGED"):
        barriers = tiered.coherence.counts["barriers"]
        reply = await tiered.writer.put(owner, [MemoryInput(text="likes tea", id="a")], strong=True)
        assert reply.memories[0].outcome == outcome
    assert tiered.coherence.counts["barriers"] == barriers + 1


async def test_no_read_from_before_a_new_push_connection_fills_l1(tiered: Service, until: Until) -> None:
    ticket = tiered.l1.open("somebody")
    connections = tiered.coherence.counts["connections"]
    await tiered.client.execute("CLIENT", "KILL", "TYPE", "PUBSUB")
    await until("a new one", lambda: asyncio.sleep(0, tiered.coherence.counts["connections"] > connections))
    assert not ticket.allows(())


async def test_a_push_connection_on_which_nothing_comes_is_made_anew(
    tiered: Service, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    connections = tiered.coherence.counts["connections"]
    execute = Client.execute

    async def mute(self: Client, *command: object) -> object:
        return None if command[0] == "EVAL" else await execute(self, *command)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "execute", mute)
    await until("a new one", lambda: asyncio.sleep(0, tiered.coherence.counts["connections"] > connections))


async def test_a_barrier_voids_reads_on_their_way(fleet: list[Service], owner: Owner) -> None:
    ticket = fleet[1].l1.open(owner.tag)
    await fleet[0].coherence.barrier({owner.tag: ["a"]})
    assert ticket.void


async def test_strangers_on_the_channel_are_not_heard(tiered: Service, until: Until) -> None:
    for junk in (b"", b"{}", b"\xff", b'{"kind":"beat"}', b'{"kind":"barrier","sender":1}'):
        await tiered.client.execute("PUBLISH", COHERENCE_CHANNEL, junk)
    await tiered.coherence.barrier({"nobody": None})
    assert tiered.coherence.is_listening


async def test_a_service_that_ends_gives_its_lease_back(tiered: Service, until: Until) -> None:
    async with assembled(tiered.settings, tiered.client, tiered.embedder) as other:
        await live(other.coherence, until)
        assert other.coherence.id.encode() in await tiered.client.execute("HKEYS", LEASES)
    assert other.coherence.id.encode() not in await tiered.client.execute("HKEYS", LEASES)


async def test_a_process_without_l1_takes_no_lease_that_others_would_wait_for(
    tiered: Service, settings: Settings, until: Until
) -> None:
    async with assembled(settings, tiered.client, tiered.embedder) as other:
        await asyncio.wait_for(other.coherence.lived(), 10)
        assert not other.coherence.is_live()
        assert other.coherence.id.encode() not in await tiered.client.execute("HKEYS", LEASES)
        await asyncio.wait_for(other.coherence.barrier({}), 1)


def test_a_fresh_server_without_a_log_is_not_trusted_to_know_the_leases() -> None:
    def info(uptime_s: int, log: int) -> bytes:
        return b"# Server\r\nuptime_in_seconds:%d\r\n# Persistence\r\naof_enabled:%d\r\n" % (uptime_s, log)

    assert has_forgotten(info(1, 0))
    assert not has_forgotten(info(1, 1))
    assert not has_forgotten(info(4, 0))
