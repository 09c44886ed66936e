"""The doctor sees what is broken, says what to do, and repairs indexes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from redismem import doctor
from redismem.cli import main
from redismem.doctor import Finding, examine
from redismem.keys import JOBS_DEAD, JOBS_LATER, VECTOR_FIELDS, Owner
from redismem.lualib import load_libraries, shipped_libraries
from redismem.query import index_schema
from redismem.service import Service
from redismem.settings import Settings
from redismem.types import MemoryInput, SearchRequest

REPAIR = "run `redismem doctor --repair`"
REEMBED = "run `redismem reembed`"


def named(findings: list[Finding], name: str) -> Finding:
    """Return the gravest finding of a check."""
    return max((f for f in findings if f.name == name), key=lambda f: ("ok", "warn", "fail").index(f.status))


async def store(service: Service, owner: Owner, count: int = 3) -> None:
    await service.writer.put(
        owner, [MemoryInput(text=f"Bee {number}", id=str(number)) for number in range(count)]
    )


async def found_ids(service: Service, owner: Owner) -> set[str]:
    request = SearchRequest(text="Bee", search_mode="keyword")
    return {hit.id for hit in (await service.search(owner, request)).memories}


async def assert_repaired(service: Service, owner: Owner, settings: Settings, what: str) -> None:
    """The index is found to be wrong, is repaired, and serves every memory."""
    before = named(await examine(settings), "indexes")
    assert (before.status, before.remedy) == ("fail", REPAIR)
    assert what in before.seen
    assert named(await examine(settings, repair=True), "indexes").status == "ok"
    assert named(await examine(settings), "indexes").status == "ok"
    assert await found_ids(service, owner) == {"0", "1", "2"}


async def test_a_healthy_store_has_no_failure(service: Service, owner: Owner, settings: Settings) -> None:
    await store(service, owner)
    findings = await examine(settings)
    assert not [finding for finding in findings if finding.status == "fail"]
    checks = "embedder redis server persistence eviction functions store jobs indexes".split()
    assert [finding.name for finding in findings] == [*checks, "round trip"]
    assert named(findings, "indexes").seen.startswith("1 of 1 users")
    assert "delete" in named(findings, "round trip").seen


async def test_nothing_of_the_round_trip_is_left(service: Service, owner: Owner, settings: Settings) -> None:
    await store(service, owner)
    keys = set(await service.client.execute("KEYS", "*"))
    indexes = await service.client.execute("FT._LIST")
    await examine(settings)
    assert set(await service.client.execute("KEYS", "*")) == keys
    assert await service.client.execute("FT._LIST") == indexes


async def test_a_dropped_index_is_found_and_repaired(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.index)
    await assert_repaired(service, owner, settings, "missing")


async def test_an_index_of_another_schema_is_found_and_repaired(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.index)
    other = ["NUMERIC" if word == "TEXT" else word for word in index_schema(owner, "embedding", 384)]
    await service.client.execute("FT.CREATE", *[word for word in other if word != "NOSTEM"])
    await service.client.execute("FT.ALIASADD", owner.index, owner.physical_index("embedding"))
    await assert_repaired(service, owner, settings, "another schema")


async def test_memories_missing_from_an_index_are_found_and_repaired(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.index)
    schema = index_schema(owner, VECTOR_FIELDS[0], service.embedder.dim)
    await service.client.execute("FT.CREATE", *schema)
    await service.client.execute("FT.ALIASADD", owner.index, schema[0])
    await assert_repaired(service, owner, settings, "0 of 3 memories are indexed")


async def test_a_parked_index_is_in_order(service: Service, owner: Owner, settings: Settings) -> None:
    await store(service, owner)
    assert await service.indexes.park(owner, 4e9)
    assert named(await examine(settings), "indexes").status == "ok"
    assert await service.client.execute("HGET", owner.meta, "index_state") == b"cold"


async def test_an_alias_that_leads_astray_is_found_and_repaired(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("FT.CREATE", *index_schema(owner, "embedding_next", 384))
    await service.client.execute("FT.ALIASUPDATE", owner.index, owner.physical_index("embedding_next"))
    await assert_repaired(service, owner, settings, "its alias leads to")
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding_next"))


async def test_a_memory_without_vector_asks_for_reembed(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("HDEL", owner.memory("1"), "embedding", "embedder")
    finding = named(await examine(settings), "indexes")
    assert (finding.status, finding.remedy) == ("warn", REEMBED)
    assert "1 memories without a vector, 0 that another service wrote" in finding.seen


async def test_a_memory_of_another_service_asks_for_reembed(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("HSET", owner.memory("theirs"), "text", "a wasp")
    finding = named(await examine(settings), "indexes")
    assert (finding.status, finding.remedy) == ("warn", REEMBED)
    assert "1 that another service wrote" in finding.seen


async def test_an_unfinished_move_asks_for_reembed(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("HSET", owner.meta, "next_embedder", "new-model")
    finding = named(await examine(settings), "indexes")
    assert (finding.status, finding.remedy) == ("warn", REEMBED)
    assert "new-model" in finding.seen


async def test_a_store_of_another_embedder_fails(service: Service, settings: Settings) -> None:
    await service.client.execute("HSET", "redismem:store", "embedder", "other-model")
    finding = named(await examine(settings), "store")
    assert finding.status == "fail"
    assert "other-model" in finding.seen
    assert REEMBED in str(finding.remedy)


async def test_a_write_between_two_looks_is_no_finding(
    service: Service, owner: Owner, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store(service, owner)
    looks = 0
    look = doctor._index_fault

    async def once_wrong(*args: Any) -> str | None:
        nonlocal looks
        looks += 1
        return "2 of 3 memories are indexed" if looks == 1 else await look(*args)

    monkeypatch.setattr(doctor, "_index_fault", once_wrong)
    assert named(await examine(settings), "indexes").status == "ok"
    assert looks == 2


async def test_many_broken_users_are_counted_not_listed(service: Service, settings: Settings) -> None:
    for number in range(8):
        await store(service, service.owner(f"user{number}"), 1)
        await service.client.execute("FT.DROPINDEX", service.owner(f"user{number}").index)
    finding = named(await examine(settings), "indexes")
    assert finding.seen.count("missing") == 5
    assert finding.seen.endswith("and 3 more users")


async def test_only_so_many_users_are_examined(
    service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        await store(service, service.owner(f"user{number}"), 1)
    monkeypatch.setattr(doctor, "MAX_OWNERS", 2)
    assert (
        "2 of 2 users examined are in order, others were not"
        in named(await examine(settings), "indexes").seen
    )


async def _load_as(service: Service, version: int) -> None:
    library = shipped_libraries()[0]
    code = library.code.replace(f"-- Version: {library.version}", f"-- Version: {version}", 1)
    await service.client.execute("FUNCTION", "LOAD", "REPLACE", code)


async def test_older_functions_are_reported(service: Service, settings: Settings) -> None:
    await _load_as(service, 0)
    finding = named(await examine(settings), "functions")
    assert finding.status == "warn"
    assert "start redismem" in str(finding.remedy)
    assert named(await examine(settings), "functions").status == "ok", "the round trip loads them"


async def test_newer_functions_are_reported_and_forbid_repair(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.index)
    await _load_as(service, 999)
    try:
        findings = await examine(settings, repair=True)
        assert named(findings, "functions").remedy == "upgrade redismem"
        assert named(findings, "repair").status == "fail"
        assert named(findings, "indexes").status == "fail"
    finally:
        await service.client.execute("FUNCTION", "FLUSH")
        await load_libraries(service.client)


async def test_a_policy_that_may_drop_memories_is_reported(service: Service, settings: Settings) -> None:
    await service.client.execute("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        finding = named(await examine(settings), "eviction")
    finally:
        await service.client.execute("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert finding.status == "warn"
    assert "noeviction" in str(finding.remedy)


async def test_a_server_without_persistence_is_reported(service: Service, settings: Settings) -> None:
    if (await service.client.execute("CONFIG", "GET", "appendonly"))[1] != b"no":
        pytest.skip("the given server persists")
    finding = named(await examine(settings), "persistence")
    assert (finding.status, finding.remedy) == ("warn", "set `appendonly yes`")


async def test_without_redis_only_the_embedder_is_examined(settings: Settings) -> None:
    findings = await examine(replace(settings, redis_url="redis://127.0.0.1:1"))
    assert [(finding.name, finding.status) for finding in findings] == [("embedder", "ok"), ("redis", "fail")]


async def test_without_an_embedder_the_store_is_examined(
    service: Service, owner: Owner, settings: Settings
) -> None:
    await store(service, owner)
    away = replace(settings, embedder="openai", embedder_model="m", embedder_url="http://127.0.0.1:1")
    findings = await examine(replace(away, embedder_deadline_s=0.2))
    assert [finding.name for finding in findings if finding.status == "fail"] == ["embedder"]
    assert named(findings, "indexes").status == "ok"
    assert "round trip" not in [finding.name for finding in findings]


@pytest.fixture
def as_command(service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("REDISMEM_REDIS_URL", redis_url)
    monkeypatch.setenv("REDISMEM_EMBEDDER", "deterministic")
    monkeypatch.setenv("REDISMEM_TESTING", "1")
    return CliRunner()


def test_the_command_exits_0_when_nothing_failed(as_command: CliRunner) -> None:
    result = as_command.invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ok"] is True


def test_the_command_exits_1_when_something_failed(as_command: CliRunner) -> None:
    result = as_command.invoke(main, ["doctor", "--redis-url", "redis://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "start Redis" in result.stdout
    result = as_command.invoke(main, ["doctor", "--json", "--redis-url", "redis://127.0.0.1:1"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"][-1]["status"] == "fail"


async def test_dead_and_late_jobs_are_told(service: Service, owner: Owner, settings: Settings) -> None:
    await service.client.execute("ZADD", JOBS_LATER, 1_700_000_000_000, owner.job("profile"))
    assert "redismem worker" in (named(await examine(settings), "jobs").remedy or "")
    await service.client.execute("HSET", JOBS_DEAD, owner.job("profile"), '{"tries":5,"error":"x","at_ms":1}')
    assert "redismem jobs" in (named(await examine(settings), "jobs").remedy or "")
