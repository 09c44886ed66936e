"""What a refreshed index scores, and what else may happen to it.

RediSearch 2.10 counts the words of old versions on, so two users with the same memories rank them otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from redismem.doctor import examine
from redismem.embedded import EmbeddedRedis
from redismem.keys import WEIGHTS, Owner
from redismem.query import index_schema
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.types import MemoryInput, MemoryPatch, SearchRequest
from redismem.worker.rounds import decay
from redismem.worker.tools import Tools
from redismem.worker.topics import topics
from tests.redis.conftest import Until
from tests.redis.test_graph import check_in_step
from tests.redis.test_reembed import OtherEmbedder, problems, reembedder
from tests.redis.test_worker import another

COUNT = 40
FUTURE_S = 4e9
NOW_MS = 1_800_000_000_000
PATIENCE_MS = 600_000
WORDS = "amber basil cedar delta ember fern grove hazel iris jade".split()
QUERIES = ("zebra", "amber|basil|cedar", "zebra|number7|jade|hazel", "changed|fern")

Act = Callable[[Service, Owner], Awaitable[object]]


def text_of(number: int) -> str:
    """Return a text with a word that all have, some that some have, one that no other has; lengths differ."""
    shared = [word for i, word in enumerate(WORDS) if number % (i + 2) == 0]
    return " ".join(["zebra", *shared, f"number{number}"])


async def filled(service: Service, owner: Owner, count: int = COUNT) -> None:
    await service.writer.put(owner, [MemoryInput(id=f"m{i}", text=text_of(i)) for i in range(count)])


async def reweighed(service: Service, owner: Owner, count: int = COUNT) -> None:
    """Index so many memories anew; what their index should say stays the same."""
    for number in range(count):
        await service.writer.update(owner, f"m{number}", MemoryPatch(importance=0.123))


async def scores(service: Service, owner: Owner) -> list[dict[str, bytes]]:
    """Return what RediSearch makes of each query: id -> BM25, as the text that it was sent in."""
    found = []
    for query in QUERIES:
        options = "WITHSCORES", "SCORER", "BM25STD", "NOCONTENT", "LIMIT", 0, 1000, "DIALECT", 2
        _, *rest = await service.client.execute("FT.SEARCH", owner.index, query, *options)
        names = (raw.decode().removeprefix(owner.memory_prefix) for raw in rest[::2])
        found.append(dict(zip(names, rest[1::2], strict=True)))
    return found


async def scores_of_one_write(service: Service, count: int = COUNT) -> list[dict[str, bytes]]:
    twin = service.owner("twin")
    await filled(service, twin, count)
    found = await scores(service, twin)
    assert len(found[0]) == count
    await service.writer.forget(twin)
    return found


async def found_ids(service: Service, owner: Owner) -> set[str]:
    """Return the ids that a search finds; it must be a whole one."""
    reply = await service.search(owner, SearchRequest(text="zebra", search_mode="keyword", limit=100))
    assert not reply.partial
    return {hit.id for hit in reply.memories}


async def meta(service: Service, owner: Owner, name: str) -> str | None:
    raw = await service.client.execute("HGET", owner.meta, name)
    return None if raw is None else raw.decode()


async def counted(service: Service, owner: Owner) -> int:
    return int(await meta(service, owner, "reindexed") or 0)


async def indexes(service: Service) -> set[str]:
    """Return the names of all indexes behind `:flat:`."""
    return {raw.decode().partition(":flat:")[2] for raw in await service.client.execute("FT._LIST")}


async def served(service: Service, owner: Owner) -> str:
    info = await service.client.execute("FT.INFO", owner.index)
    name: bytes = info[info.index(b"index_name") + 1]
    return name.decode()


async def begin(service: Service, owner: Owner, now_ms: int = NOW_MS, *, field: str = "embedding") -> Any:
    """Begin to refresh an index that was not refreshed before."""
    made = owner.physical_index(field, again=True)
    schema = index_schema(owner, field, service.embedder.dim, again=True)
    return await service.functions.call(
        "rm_refresh_begin_v1", [made, owner.meta], now_ms, PATIENCE_MS, *schema
    )


async def reindex(service: Service, owner: Owner, *numbers: int) -> None:
    ids = [f"m{number}" for number in numbers]
    await service.functions.call("rm_reindex_v1", [owner.ids], owner.memory_prefix, *ids)


async def end(service: Service, owner: Owner, word: bytes, counted: int = 0, *, again: bool = True) -> bytes:
    """End to refresh an index; `counted` is what had worn the old one when it was begun."""
    keys = [owner.index, owner.physical_index("embedding", again=again), owner.meta, owner.searches]
    outcome: bytes = await service.functions.call("rm_refresh_end_v1", keys, word, counted)
    return outcome


def tools_of(service: Service) -> Tools:
    return another(service)._tools


async def decayed(service: Service, owner: Owner) -> None:
    await service.client.execute("HSET", WEIGHTS, "*", "[0.5]")
    await decay(tools_of(service), owner)


async def clustered(service: Service, owner: Owner) -> None:
    await topics(tools_of(service), owner)


async def changed_and_back(service: Service, owner: Owner) -> None:
    for text in ("changed to something much longer than it was before", None):
        for number in range(COUNT):
            patch = MemoryPatch(text=text or text_of(number))
            await service.writer.update(owner, f"m{number}", patch)


async def rewritten(service: Service, owner: Owner) -> None:
    await service.writer.put(owner, [MemoryInput(id=f"m{i}", text="changed") for i in range(COUNT)])
    await filled(service, owner)


# scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wear", [clustered, decayed, changed_and_back, rewritten, reweighed])
async def test_a_refreshed_index_scores_as_one_written_once(
    service: Service, owner: Owner, no_backfill: list[str], wear: Act
) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    assert await scores(service, owner) == once
    await wear(service, owner)
    assert await counted(service, owner) >= COUNT
    assert await scores(service, owner) != once
    assert await service.indexes.refresh(owner)
    assert await scores(service, owner) == once
    assert await served(service, owner) == owner.physical_index("embedding", again=True)
    assert await indexes(service) == {"embedding:again"}


@pytest.mark.parametrize("kind", ["topics", "decay", "link", "embed"])
async def test_the_worker_leaves_no_worn_index(service: Service, owner: Owner, kind: str) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    await service.client.execute("HSET", WEIGHTS, "*", "[0.5]")
    if kind in ("link", "embed"):  # they find what another job left
        await reweighed(service, owner)
    await another(service).make(owner, kind)
    assert await served(service, owner) == owner.physical_index("embedding", again=True)
    assert await scores(service, owner) == once


async def test_the_two_names_are_used_in_turns(service: Service, owner: Owner) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    for name in ("embedding:again", "embedding", "embedding:again"):
        await reweighed(service, owner)
        assert await service.indexes.refresh(owner)
        assert await indexes(service) == {name}
        assert (await scores(service, owner), await counted(service, owner)) == (once, 0)


@asynccontextmanager
async def kept(folder: Path) -> AsyncIterator[Service]:
    async with EmbeddedRedis(folder) as redis:
        settings = Settings(
            redis_url=redis.url, embedder="deterministic", testing=True, l1_entries=0, l2_searches=0
        )
        async with open_service(settings) as service:
            yield service


@pytest.mark.parametrize("log", ["replayed", "rewritten"])
async def test_a_restart_keeps_the_refreshed_scores(until: Until, log: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rmem") as folder:
        async with kept(Path(folder)) as service:
            owner = service.owner("alice")
            once = await scores_of_one_write(service)
            await filled(service, owner)
            await reweighed(service, owner)
            assert await service.indexes.refresh(owner)
            if log == "rewritten":
                before = (await service.client.execute("INFO", "persistence")).decode()
                assert "aof_rewrite_in_progress:0" in before
                await service.client.execute("BGREWRITEAOF")

                async def is_rewritten() -> bool:
                    info = (await service.client.execute("INFO", "persistence")).decode()
                    return "aof_rewrite_in_progress:0" in info and "aof_rewrite_scheduled:0" in info

                await until("the log is rewritten", is_rewritten)
        async with kept(Path(folder)) as service:
            assert await served(service, owner) == owner.physical_index("embedding", again=True)
            assert await indexes(service) == {"embedding:again"}
            assert await scores(service, owner) == once
            assert await service.indexes.open(owner)
            assert len(await found_ids(service, owner)) == COUNT


# what else happens to it -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["meanwhile", "afterwards"])
async def test_forgetting_leaves_no_index_and_no_key(service: Service, owner: Owner, when: str) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    if when == "meanwhile":
        word = await begin(service, owner)
        await reindex(service, owner, *range(COUNT // 2))
    else:
        assert await service.indexes.refresh(owner)
    await service.writer.forget(owner)
    if when == "meanwhile":
        await reindex(service, owner, *range(COUNT))
        assert await end(service, owner, word) == b"STALE"
        assert await begin(service, owner) == b"GONE"
    assert not await service.indexes.refresh(owner)
    assert await indexes(service) == set()
    assert await service.client.execute("KEYS", "*{alice}*") == []


async def test_an_older_caller_forgets_a_refreshed_index_too(service: Service, owner: Owner) -> None:
    """It names the indexes that it knows, and no key of what is derived."""
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    await reweighed(service, owner)
    made = owner.physical_index("embedding")
    schema = index_schema(owner, "embedding", service.embedder.dim)
    await service.functions.call("rm_refresh_begin_v1", [made, owner.meta], NOW_MS, 0, *schema)
    assert await indexes(service) == {"embedding", "embedding:again"}
    keys = [owner.index, owner.meta, owner.ids, owner.log, owner.turns]
    known = [owner.physical_index(field) for field in ("embedding_next", "unheard_of")]
    for done in (0, 1):
        reply = await service.functions.call("rm_forget_v1", keys, owner.memory_prefix, 1000, *known)
        assert reply[3] == done
    assert await indexes(service) == set()
    assert not {owner.meta, owner.ids} & {raw.decode() for raw in await service.client.execute("KEYS", "*")}


async def test_a_refreshed_index_is_parked_and_comes_back(service: Service, owner: Owner) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    assert await service.indexes.park(owner, FUTURE_S)
    assert await indexes(service) == set()
    assert await service.indexes.complete(owner, None)
    assert len(await found_ids(service, owner)) == COUNT
    assert await scores(service, owner) == once
    assert await indexes(service) == {"embedding"}


async def test_an_index_that_is_refreshed_is_not_parked(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    await service.client.execute("HSET", owner.meta, "last_activity", 1000, "last_read", 1000)
    word, before_s = await begin(service, owner), NOW_MS / 1000 - 1
    assert not await service.indexes.park(owner, before_s)
    await reindex(service, owner, *range(COUNT))
    assert await end(service, owner, word) == b"OK"
    assert await service.indexes.park(owner, before_s)


async def test_a_refreshed_user_moves_to_another_embedder(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    for embedder in (OtherEmbedder(dim=32), OtherEmbedder(dim=48)):
        await reweighed(service, owner)
        assert await service.indexes.refresh(owner)
        await reembedder(service, embedder).move(owner)
        assert await problems(service, owner, embedder) == []


async def opened_again(service: Service, owner: Owner) -> None:
    assert await service.indexes.open(owner)


async def opened_by_a_model(service: Service, owner: Owner) -> None:
    keys = [owner.index, owner.physical_index("embedding"), owner.meta]
    schema = index_schema(owner, "embedding", service.embedder.dim)
    head = NOW_MS, service.embedder.name, service.embedder.dim, "embedding"
    assert await service.functions.call("rm_open_v1", keys, *head, *schema) == b"OK"


async def examined(service: Service, owner: Owner) -> None:
    findings = await examine(service.settings, repair=True)
    assert [one.status for one in findings if one.name == "indexes"] == ["ok"]


@pytest.mark.parametrize("act", [opened_again, opened_by_a_model, examined])
@pytest.mark.parametrize("is_next_begun", [False, True])
async def test_who_opens_a_user_again_keeps_the_refreshed_index(
    service: Service, owner: Owner, act: Act, is_next_begun: bool
) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    wanted = {"embedding:again"}
    if is_next_begun:
        made = owner.physical_index("embedding")
        schema = index_schema(owner, "embedding", service.embedder.dim)
        await service.functions.call("rm_refresh_begin_v1", [made, owner.meta], NOW_MS, 0, *schema)
        wanted = {"embedding", "embedding:again"}
    before = await scores(service, owner)
    await act(service, owner)
    assert await served(service, owner) == owner.physical_index("embedding", again=True)
    assert await meta(service, owner, "index") == owner.physical_index("embedding", again=True)
    assert (await scores(service, owner), await indexes(service)) == (before, wanted)


@pytest.mark.parametrize("is_there", [False, True])
async def test_the_doctor_repairs_a_lost_or_empty_refreshed_index(
    service: Service, owner: Owner, is_there: bool
) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    await service.client.execute("FT.DROPINDEX", owner.index)
    if is_there:
        schema = index_schema(owner, "embedding", service.embedder.dim, again=True)
        await service.client.execute("FT.CREATE", *schema)
        await service.client.execute("FT.ALIASADD", owner.index, schema[0])
    await examined(service, owner)
    assert len(await found_ids(service, owner)) == COUNT
    assert await indexes(service) == {"embedding"}


async def test_a_graph_outlives_the_refresh(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    assert await service.graphs.build(owner, "production")
    graph = await meta(service, owner, "graph")
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    assert (await meta(service, owner, "algorithm"), await meta(service, owner, "graph")) == ("HNSW", graph)
    await check_in_step(service, owner)
    reply = await service.search(owner, SearchRequest(text="amber", explain=True))
    assert reply.plan is not None
    assert reply.plan.index == "hnsw"
    assert reply.memories
