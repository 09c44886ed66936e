"""Old quarters in files: what leaves Redis, what comes back, and what stays gone."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import zstandard

from redismem.archive import RESTORED_STAYS_S, Archive
from redismem.archivelines import Manifest
from redismem.archiverun import quarter_number
from redismem.codec import quarter
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.errors import InvalidInput, NotFound
from redismem.graph import Graphs
from redismem.keys import Owner
from redismem.reembed import Reembedder
from redismem.service import Service
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchRequest
from tests.redis.conftest import Counter

NOW_S = datetime(2026, 5, 15, tzinfo=UTC).timestamp()
SPRING, WINTER = "2023-Q2", "2024-Q1"  # eight quarters before 2026-Q2 stay
OLD, NEXT, KEPT = (
    datetime(2023, 5, 1, tzinfo=UTC),
    datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 4, 1, tzinfo=UTC),
)

Fields = dict[str, dict[bytes, bytes]]


@pytest.fixture
def archive(service: Service, tmp_path: Path) -> Archive:
    return archive_at(service, str(tmp_path / "archive"))


def archive_at(service: Service, url: str) -> Archive:
    return Archive(service.functions, replace(service.settings, archive_url=url), service.embedder)


async def fill(service: Service, owner: Owner, count: int = 150) -> None:
    """Write turns and memories of two old quarters, and some of a young one."""
    memories = [
        MemoryInput(
            id=f"{name}{i}",
            text=f"zebra {name} number{i}",
            event_date=day + timedelta(hours=i),
            session_id=f"{name}{i % 3}" if i % 4 else None,
            topics=["a|b", "c%d"],
            metadata={"n": i, "ü": ["\0", "☃"]},
        )
        for name, day, share in (("old", OLD, 2), ("next", NEXT, 3), ("kept", KEPT, 6))
        for i in range(count // share)
    ]
    await service.writer.put(owner, memories)
    assert await service.backfill.drained(10)


async def stored(service: Service, owner: Owner) -> Fields:
    """Return every memory's hash, without what each write changes."""
    ids = await service.client.execute("ZRANGE", owner.ids, 0, -1)
    rows = await service.client.pipeline([("HGETALL", owner.memory(raw.decode())) for raw in ids])
    found = {}
    for raw, row in zip(ids, rows, strict=True):
        found[raw.decode()] = dict(zip(row[::2], row[1::2], strict=True))
        found[raw.decode()].pop(b"version", None)
    return found


async def archived(service: Service, owner: Owner) -> set[str]:
    return {raw.decode() for raw in await service.client.execute("ZRANGE", owner.archived, 0, -1)}


async def words(service: Service, owner: Owner) -> bytes | None:
    word: bytes | None = await service.client.execute("HGET", owner.meta, "archived")
    return word


async def totals(service: Service, owner: Owner) -> list[int]:
    """Return how many memories are listed, and found by words and by meaning."""
    listed = await service.client.execute("ZCARD", owner.ids)
    found = [
        (await service.search(owner, SearchRequest(text="zebra", search_mode=mode, limit=1))).total
        for mode in ("keyword", "semantic")
    ]
    return [listed, *found]


def after() -> int:
    """Return the setting with which the real clock archives what NOW_S does."""
    return quarter_number(quarter(time.time())) - quarter_number("2024-Q2")


def of(memories: Fields, *names: str) -> set[str]:
    return {memory_id for memory_id in memories if memory_id.startswith(names)}


def on_disk(root: Path) -> bytes:
    """Return everything the archive holds, unpacked."""
    unpack = zstandard.ZstdDecompressor()
    return b"".join(
        unpack.stream_reader(path.read_bytes()).read() if path.suffix == ".zst" else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    )


async def test_old_quarters_leave_redis_and_come_back_as_they_were(
    service: Service, owner: Owner, archive: Archive
) -> None:
    await fill(service, owner)
    await service.client.execute("HSET", owner.memory("old1"), "foreign", b"\xff\x00", "by", "another")
    before, places = await stored(service, owner), await service.client.execute("HGETALL", owner.turns)
    assert await archive.archive_old(owner, NOW_S) == {SPRING: 75, WINTER: 50}
    assert await totals(service, owner) == [25, 25, 25]
    assert await archived(service, owner) == of(before, "old", "next")
    assert await words(service, owner) == f"{SPRING} {WINTER}".encode()
    assert await service.client.execute("ZSCORE", owner.archived, "old0") == b"8093"
    with pytest.raises(NotFound):
        await service.browser.get(owner, "old1")
    assert [event.event for event in (await service.browser.history(owner, "old1")).events][-1] == "archived"
    assert await archive.archive_old(owner, NOW_S) == {}

    assert await archive.restore(owner) == {SPRING: 75, WINTER: 50}
    assert await stored(service, owner) == before
    assert await service.client.execute("HGETALL", owner.turns) == places
    assert await totals(service, owner) == [150, 150, 150]
    assert (await archived(service, owner), await words(service, owner)) == (set(), None)
    assert [event.event for event in (await service.browser.history(owner, "old1")).events][-1] == "restored"
    listed = await service.client.execute("ZRANGE", owner.ids, 0, -1, "WITHSCORES")
    assert float(listed[1]) == float(before[listed[0].decode()][b"created_at"])


async def test_a_quarter_lies_in_a_file_that_others_can_read(
    service: Service, owner: Owner, archive: Archive, tmp_path: Path
) -> None:
    await fill(service, owner)
    before = await stored(service, owner)
    await archive.archive_old(owner, NOW_S)
    spring, winter = await archive.quarters(owner)
    assert (spring.quarter, spring.count, winter.quarter, winter.count) == (SPRING, 75, WINTER, 50)
    assert (spring.embedder, spring.dim) == (service.embedder.name, service.embedder.dim)
    folder = tmp_path / "archive" / "alice"
    assert {path.name for path in folder.iterdir()} == {
        name for item in (spring, winter) for name in (item.name, item.file)
    }
    assert folder.stat().st_mode & 0o077 == 0
    packed = (folder / spring.file).read_bytes()
    assert (len(packed), sha256(packed).hexdigest()) == (spring.bytes, spring.sha256)
    assert msgspec.json.decode((folder / spring.name).read_bytes(), type=Manifest) == spring
    lines = zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines()
    for raw in lines:
        line = msgspec.json.decode(raw)
        text = {name.decode(): value for name, value in before[line["id"]].items() if name != b"embedding"}
        assert {name: value.encode() for name, value in line["fields"].items() if name != "version"} == text
    assert len(lines) == 75


async def test_pinned_young_and_expiring_memories_and_foreign_quarters_stay(
    service: Service, owner: Owner, archive: Archive
) -> None:
    old = [MemoryInput(id=name, text=f"zebra {name}", event_date=OLD) for name in "abcde"]
    await service.writer.put(owner, old)
    await service.writer.update(owner, "a", MemoryPatch(pinned=True))
    await service.client.execute("EXPIRE", owner.memory("b"), 1000)
    await service.client.execute("HSET", owner.memory("c"), "partition", "long ago")
    await service.client.execute("HSET", owner.memory("d"), b"\xff", "no JSON can hold this name")
    await service.client.execute("ZADD", owner.ids, 1, b"\xff\xfe")
    assert await archive.archive_old(owner, NOW_S) == {SPRING: 1}
    assert await archived(service, owner) == {"e"}
    assert await archive.archive_old(owner, datetime(2025, 6, 30, 23, tzinfo=UTC).timestamp()) == {}


async def test_superseded_memories_are_archived_and_stay_superseded(
    service: Service, owner: Owner, archive: Archive
) -> None:
    for name, previous in (("a", []), ("b", ["a"])):
        memory = MemoryInput(id=name, text=f"zebra {name}", event_date=OLD)
        if previous:
            await service.writer.correct(owner, CorrectionRequest(ids=previous, memory=memory))
        else:
            await service.writer.put(owner, [memory])
    assert await archive.archive_old(owner, NOW_S) == {SPRING: 2}
    await archive.restore(owner, SPRING)
    found = await service.search(owner, SearchRequest(text="zebra"))
    assert [hit.id for hit in found.memories] == ["b"]
    assert (await service.browser.get(owner, "a")).superseded_by == "b"


async def test_hot_memories_and_cached_searches_leave_with_the_quarter(
    tiered: Service, tmp_path: Path
) -> None:
    owner, archive = tiered.owner("alice"), archive_at(tiered, str(tmp_path / "archive"))
    await fill(tiered, owner, 12)
    await tiered.search(owner, SearchRequest(text="zebra"))
    await tiered.client.execute("ZADD", owner.hot, 1, "old1", 2, "kept1")
    await tiered.client.execute("HSET", owner.hits, "old1", 1, "kept1", 2)
    for key in (owner.hot, owner.hits):
        await tiered.client.execute("EXPIRE", key, 1000)
    assert await tiered.client.execute("EXISTS", owner.searches)
    await archive.archive_old(owner, NOW_S)
    assert await tiered.client.execute("EXISTS", owner.searches) == 0
    assert await tiered.client.execute("ZRANGE", owner.hot, 0, -1) == [b"kept1"]
    assert await tiered.client.execute("HKEYS", owner.hits) == [b"kept1"]
    found = await tiered.search(owner, SearchRequest(text="zebra", consistency="strong"))
    assert {hit.id for hit in found.memories} == {"kept0", "kept1"}


async def test_what_is_deleted_while_archived_never_comes_back_and_leaves_the_disk(
    service: Service, owner: Owner, archive: Archive, tmp_path: Path
) -> None:
    await fill(service, owner)
    await archive.archive_old(owner, NOW_S)
    await service.writer.delete(owner, "old7")
    assert b'zebra old number7"' in on_disk(tmp_path)
    assert await archive.purge(owner) == 1
    assert b'zebra old number7"' not in on_disk(tmp_path)
    assert b'zebra old number8"' in on_disk(tmp_path)
    assert await archive.purge(owner) == 0
    await service.writer.delete(owner, "next3")
    assert await archive.restore(owner) == {SPRING: 74, WINTER: 49}
    assert await service.client.execute("EXISTS", owner.memory("old7"), owner.memory("next3")) == 0
    assert await archive.purge(owner) == 74 + 50
    assert await archive.quarters(owner) == []
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["store.json"]


async def test_a_quarter_whose_last_memory_is_deleted_is_forgotten(
    service: Service, owner: Owner, archive: Archive
) -> None:
    await service.writer.put(owner, [MemoryInput(id="a", text="zebra", event_date=OLD)])
    await archive.archive_old(owner, NOW_S)
    await service.writer.delete(owner, "a")
    assert await words(service, owner) == SPRING.encode()
    assert await archive.purge(owner) == 1
    assert (await words(service, owner), await archive.quarters(owner)) == (None, [])


async def test_what_is_written_anew_wins_over_the_archive(
    service: Service, owner: Owner, archive: Archive
) -> None:
    await fill(service, owner)
    await archive.archive_old(owner, NOW_S)
    await service.writer.put(owner, [MemoryInput(id="old1", text="zebra anew")])
    await service.client.execute("HSET", owner.memory("old2"), "text", "zebra by hand")
    assert await archive.restore(owner, SPRING) == {SPRING: 73}
    assert (await service.browser.get(owner, "old1")).text == "zebra anew"
    assert (await service.browser.get(owner, "old2")).text == "zebra by hand"
    assert await archived(service, owner) == {f"next{i}" for i in range(50)}


async def test_later_memories_of_an_archived_quarter_join_its_file(
    service: Service, owner: Owner, archive: Archive, tmp_path: Path
) -> None:
    await fill(service, owner)
    await archive.archive_old(owner, NOW_S)
    await service.writer.delete(owner, "old1")
    late = [MemoryInput(id=f"late{i}", text=f"zebra late{i}", event_date=OLD) for i in range(3)]
    await service.writer.put(owner, late)
    assert await archive.archive_old(owner, NOW_S) == {SPRING: 3}
    assert [(item.quarter, item.count) for item in await archive.quarters(owner)] == [
        (SPRING, 77),
        (WINTER, 50),
    ]
    assert len(list((tmp_path / "archive" / "alice").iterdir())) == 4
    assert b'zebra old number1"' not in on_disk(tmp_path)
    assert await archive.restore(owner, SPRING) == {SPRING: 77}


async def test_restoring_again_changes_nothing(service: Service, owner: Owner, archive: Archive) -> None:
    await fill(service, owner)
    await archive.archive_old(owner, NOW_S)
    assert await archive.restore(owner, WINTER) == {WINTER: 50}
    generation = await service.client.execute("HGET", owner.meta, "generation")
    assert await archive.restore(owner, WINTER) == {}
    assert await service.client.execute("HGET", owner.meta, "generation") == generation
    assert await words(service, owner) == SPRING.encode()
    assert await archive.restore(owner, "2001-Q1") == {}
    for wrong in ("2024-Q5", "24-Q1", "2024Q1", "", "٢٠٢٤-Q1"):
        with pytest.raises(InvalidInput):
            await archive.restore(owner, wrong)


async def test_a_restored_quarter_stays_for_a_month_unless_it_is_named(
    service: Service, owner: Owner, tmp_path: Path
) -> None:
    await fill(service, owner, 12)
    now_s, settings = (
        time.time(),
        replace(service.settings, archive_url=str(tmp_path), archive_after_quarters=after()),
    )
    archive = Archive(service.functions, settings, service.embedder)
    assert set(await archive.archive_old(owner, now_s)) == {SPRING, WINTER}
    await archive.restore(owner, SPRING)
    assert await archive.archive_old(owner, now_s) == {}
    assert await archive.archive_old(owner, now_s, WINTER) == {}
    assert await archive.archive_old(owner, now_s, SPRING) == {SPRING: 6}
    await archive.restore(owner, SPRING)
    assert await archive.archive_old(owner, now_s + RESTORED_STAYS_S + 60) == {SPRING: 6}


async def test_a_vector_comes_back_only_with_the_turn_it_was_made_from(
    service: Service, owner: Owner, archive: Archive, no_backfill: list[str]
) -> None:
    turns = [
        MemoryInput(id=f"t{i}", text=f"zebra turn{i}", session_id="s", event_date=OLD if i < 4 else KEPT)
        for i in range(5)
    ]
    await service.writer.put(owner, turns)
    await archive.archive_old(owner, NOW_S)
    await service.writer.delete(owner, "t1")  # t2's vector was made from it as well
    assert await archive.restore(owner) == {SPRING: 3}
    embedded = [(await service.browser.get(owner, f"t{i}")).embedded for i in (0, 2, 3, 4)]
    assert embedded == [True, False, True, True]
    reembedder = Reembedder(service.client, service.functions, service.embedder)
    assert await reembedder.run() == 1


async def test_vectors_come_back_also_when_later_turns_were_archived_first(
    service: Service, owner: Owner, archive: Archive
) -> None:
    await fill(service, owner, 30)
    before = await stored(service, owner)
    early = [f"old{i}" for i in range(8)]
    await service.client.pipeline([("EXPIRE", owner.memory(name), 1000) for name in early])
    assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 7}
    await service.client.pipeline([("PERSIST", owner.memory(name)) for name in early])
    assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 8}
    assert await archive.restore(owner) == {SPRING: 15}
    assert await stored(service, owner) == before


async def test_memories_come_back_without_vectors_after_a_change_of_embedder(
    service: Service, owner: Owner, archive: Archive
) -> None:
    await fill(service, owner, 30)
    await archive.archive_old(owner, NOW_S)
    other = DeterministicEmbedder(64)
    reembedder = Reembedder(service.client, service.functions, other)
    await reembedder.run()
    assert await archive.restore(owner) == {SPRING: 15, WINTER: 10}
    assert await reembedder.run() == 25
    found = await service.search(owner, SearchRequest(text="zebra", search_mode="keyword"))
    assert found.total == 30


async def test_memories_come_back_to_a_parked_index(service: Service, owner: Owner, archive: Archive) -> None:
    await fill(service, owner)
    await archive.archive_old(owner, NOW_S)
    assert await service.indexes.park(owner, 4e9)
    assert await archive.restore(owner) == {SPRING: 75, WINTER: 50}
    assert await totals(service, owner) == [150, 150, 150]


async def test_a_graph_follows_the_archive(service: Service, owner: Owner, archive: Archive) -> None:
    await fill(service, owner, 60)
    await Graphs(service.functions).build(owner, "low_latency")
    assert await service.client.execute("VCARD", owner.graphs[0]) == 60
    await archive.archive_old(owner, NOW_S)
    assert await service.client.execute("VCARD", owner.graphs[0]) == 10
    assert await archive.restore(owner) == {SPRING: 30, WINTER: 20}
    assert await service.client.execute("VCARD", owner.graphs[0]) == 60
    assert await service.client.execute("HGET", owner.meta, "algorithm") == b"HNSW"


async def test_rounds_look_only_where_something_was_written(
    service: Service, owner: Owner, archive: Archive, round_trips: Counter
) -> None:
    await fill(service, owner, 12)
    day_s = 86_400
    assert await archive.tend(owner, NOW_S) == 10
    await service.writer.delete(owner, "old1")
    assert await archive.tend(owner, NOW_S) == 0
    assert [item.count for item in await archive.quarters(owner)] == [5, 4]
    assert await archive.tend(owner, NOW_S) == 0
    with round_trips() as sent:
        assert await archive.tend(owner, NOW_S) == 0
    assert sent == ["HMGET"]
    with round_trips() as sent:
        assert await archive.tend(owner, NOW_S + day_s) == 0
    assert len(sent) > 1
    await service.writer.put(owner, [MemoryInput(id="late", text="zebra", event_date=OLD)])
    assert await archive.tend(owner, NOW_S + day_s) == 1
    assert await archive.tend(service.owner("nobody"), NOW_S) == 0
    assert await service.client.execute("EXISTS", service.owner("nobody").meta) == 0
