"""The archive beside deletes, changes, forgetting, and runs of it that start, stop and wake at any time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from redismem import archivelines, archiverun
from redismem.archive import Archive
from redismem.archivefiles import Files
from redismem.errors import Conflict
from redismem.keys import VECTOR_FIELDS, Owner
from redismem.lualib import Functions
from redismem.service import Service
from redismem.types import MemoryInput, MemoryPatch
from tests.redis.test_archive import (
    NOW_S,
    OLD,
    SPRING,
    WINTER,
    Fields,
    archive_at,
    archived,
    fill,
    of,
    stored,
)
from tests.redis.test_archive_faults import check_whole

Work = Callable[[], Awaitable[object]]
Before = Callable[[str, int, Work], None]


@pytest.fixture
def archive(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """An archive that takes so few memories at once that even a small test has several parts."""
    monkeypatch.setattr(archivelines, "PART", 8)
    monkeypatch.setattr(archiverun, "PART", 8)
    return archive_at(service, str(tmp_path / "archive"))


@pytest.fixture
async def before(service: Service, owner: Owner) -> Fields:
    await fill(service, owner, 40)
    return await stored(service, owner)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Before:
    """Do something first when a Function is called for the n-th time."""
    call = Functions.call

    def arrange(function: str, number: int, work: Work) -> None:
        left = number

        async def calling(self: Functions, name: str, *args: Any, **options: Any) -> Any:
            nonlocal left
            left -= name == function
            if name == function and left == 0:
                await work()
            return await call(self, name, *args, **options)

        monkeypatch.setattr(Functions, "call", calling)

    return arrange


async def test_what_changes_after_the_file_was_written_stays(
    service: Service, owner: Owner, archive: Archive, before: Fields, first: Before
) -> None:
    async def change() -> None:
        writer, client = service.writer, service.client
        await writer.delete(owner, "old0")
        await writer.update(owner, "old1", MemoryPatch(importance=0.9))
        await writer.update(owner, "old2", MemoryPatch(pinned=True))
        await client.execute("HSET", owner.memory("old3"), "text", "zebra by hand")
        await client.execute("HSET", owner.memory("old4"), "by", "hand")
        await client.execute("HDEL", owner.memory("old5"), "topics")
        await client.execute("DEL", owner.memory("old6"))
        await client.execute("SET", owner.memory("old6"), "foreign")

    first("rm_archive_v1", 1, change)
    assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 13}
    left = {f"old{i}" for i in range(1, 6)}
    assert await archived(service, owner) == of(before, "old") - {f"old{i}" for i in range(7)}
    await service.client.execute("DEL", owner.memory("old6"))
    live = await stored(service, owner)
    assert left <= live.keys()
    assert live["old3"][b"text"] == b"zebra by hand"
    assert b"topics" not in live["old5"]
    assert await archive.restore(owner) == {SPRING: 13}
    assert (await service.browser.get(owner, "old1")).importance == 0.9
    assert await service.client.execute("EXISTS", owner.memory("old0")) == 0


async def test_a_delete_is_kept_at_whatever_point_it_comes(
    service: Service,
    owner: Owner,
    archive: Archive,
    before: Fields,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A delete between any two parts of archiving, and again of restoring."""
    call, victims, gone = service.functions.call, iter(of(before, "old")), set()

    async def deleting(name: str, *args: Any, **options: Any) -> Any:
        if name in ("rm_records_ro_v1", "rm_archive_v1", "rm_restore_v1", "rm_recount_v1"):
            gone.add(victim := next(victims))
            await service.writer.delete(owner, victim)
        return await call(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(archive._functions, "call", deleting)
        await archive.archive_old(owner, NOW_S, SPRING)
    assert (await stored(service, owner)).keys() | await archived(service, owner) == before.keys() - gone
    with monkeypatch.context() as patch:
        patch.setattr(archive._functions, "call", deleting)
        await archive.restore(owner)
    await archive.purge(owner)
    assert len(gone) >= 8
    assert (await stored(service, owner)).keys() == before.keys() - gone
    assert await archived(service, owner) == set()


async def forget_in_redis(service: Service, owner: Owner) -> None:
    done = 0
    while not done:
        keys, names = [owner.index, *owner.written], [owner.physical_index(name) for name in VECTOR_FIELDS]
        done = (await service.functions.call("rm_forget_v1", keys, owner.memory_prefix, 500, *names))[3]


async def test_a_forget_meanwhile_leaves_nothing_anywhere(
    service: Service, owner: Owner, archive: Archive, before: Fields, first: Before, tmp_path: Path
) -> None:
    async def forget() -> None:
        await forget_in_redis(service, owner)
        await archive.forget(owner)

    first("rm_archive_v1", 1, forget)
    assert await archive.archive_old(owner, NOW_S) == {}
    assert await service.client.execute("KEYS", "*{alice}*") == []
    assert not (tmp_path / "archive" / "alice").exists()


async def test_forgetting_removes_the_files_and_may_be_repeated(
    service: Service, owner: Owner, archive: Archive, before: Fields, tmp_path: Path
) -> None:
    await archive.archive_old(owner, NOW_S)
    bob = service.owner("bob")
    await fill(service, bob, 12)
    await archive.archive_old(bob, NOW_S)
    await forget_in_redis(service, owner)
    assert await archive.forget(owner) == 33
    assert await archive.forget(owner) == 0
    assert await archive.restore(owner) == {}
    assert [path.name for path in sorted((tmp_path / "archive").iterdir())] == ["bob", "store.json"]
    await archive.restore(bob)
    # of one who was forgotten in Redis only
    await archive.archive_old(bob, NOW_S, SPRING)
    await forget_in_redis(service, bob)
    assert await archive.purge(bob) == 6 + 4
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["store.json"]


async def test_runs_at_the_same_time_lose_nothing(
    service: Service, owner: Owner, archive: Archive, before: Fields, tmp_path: Path
) -> None:
    others = [archive_at(service, str(tmp_path / "archive")) for _ in range(3)]
    for _ in range(5):
        outcomes = await asyncio.gather(
            *(other.archive_old(owner, NOW_S, name) for other in others for name in (SPRING, WINTER)),
            *(other.restore(owner, SPRING) for other in others),
            *(other.purge(owner) for other in others),
            return_exceptions=True,
        )
        assert {type(outcome) for outcome in outcomes} <= {dict, int, Conflict}, outcomes
        await check_whole(service, owner, before)
    await archive.restore(owner)
    assert await stored(service, owner) == before


@pytest.mark.parametrize("point", ["save", "copy", "finished", "remove"])
async def test_a_run_that_was_stopped_and_wakes_late_spoils_nothing(
    service: Service,
    owner: Owner,
    archive: Archive,
    before: Fields,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    stopped, go_on = threading.Event(), threading.Event()
    step = getattr(Files, point)

    def stopping(*args: Any, **options: Any) -> Any:
        if not stopped.is_set():
            stopped.set()
            assert go_on.wait(20)
        return step(*args, **options)

    await archive.archive_old(owner, NOW_S, SPRING)
    await service.writer.put(owner, [MemoryInput(id="late", text="zebra late", event_date=OLD)])
    whole = await stored(service, owner) | before
    monkeypatch.setattr(Files, point, stopping)
    late = asyncio.create_task(archive.archive_old(owner, NOW_S, SPRING))
    await asyncio.to_thread(stopped.wait, 20)
    other = archive_at(service, str(tmp_path / "archive"))
    await other.restore(owner)
    await service.writer.update(owner, "late", MemoryPatch(text="zebra later"))
    whole["late"] = (await stored(service, owner))["late"]
    assert await other.archive_old(owner, NOW_S, SPRING) == {SPRING: 21}
    go_on.set()
    outcome = (await asyncio.gather(late, return_exceptions=True))[0]
    assert isinstance(outcome, Conflict) or point == "remove", outcome
    await check_whole(service, owner, whole)
    await archive.restore(owner)
    assert await stored(service, owner) == whole


async def test_a_redis_that_lost_its_last_second_overwrites_no_file(
    service: Service, owner: Owner, archive: Archive, before: Fields
) -> None:
    await archive.archive_old(owner, NOW_S, SPRING)
    (item,) = await archive.quarters(owner)
    await service.writer.put(owner, [MemoryInput(id="late", text="zebra late", event_date=OLD)])
    await service.client.execute("HSET", owner.meta, "archive_run", item.run - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archiverun.time, "time", lambda: item.run / 1_000_000 - 60)  # nor is the clock of help
        assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 1}
    (merged,) = await archive.quarters(owner)
    assert (merged.count, merged.run > item.run) == (21, True)


async def test_a_cancelled_run_leaves_no_open_file_and_goes_on_later(
    service: Service, owner: Owner, archive: Archive, before: Fields, tmp_path: Path
) -> None:
    for turns in range(1, 120, 3):
        task = asyncio.create_task(archive.archive_old(owner, NOW_S, SPRING))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await check_whole(service, owner, before)
    await archive.archive_old(owner, NOW_S, SPRING)
    await archive.restore(owner)
    assert await stored(service, owner) == before


async def test_what_is_pinned_before_it_is_read_stays(
    service: Service, owner: Owner, archive: Archive, before: Fields, first: Before
) -> None:
    first("rm_records_ro_v1", 1, lambda: service.writer.update(owner, "old2", MemoryPatch(pinned=True)))
    assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 19}
    assert (await service.browser.get(owner, "old2")).pinned


@pytest.mark.parametrize("number", [1, 2])
async def test_a_run_that_is_overtaken_keeps_the_file_of_what_it_has_moved(
    service: Service,
    owner: Owner,
    archive: Archive,
    before: Fields,
    tmp_path: Path,
    first: Before,
    number: int,
) -> None:
    """It may be all there is: the newer run has only begun."""
    first("rm_archive_v1", number, lambda: service.functions.call("rm_archive_begin_v1", [owner.meta], 1))
    with pytest.raises(Conflict):
        await archive.archive_old(owner, NOW_S, SPRING)
    await check_whole(service, owner, before)
    assert len(await archived(service, owner)) == 8 * (number - 1)
    assert (tmp_path / "archive" / "alice").exists() == (number > 1)
    await archive.restore(owner)
    assert await stored(service, owner) == before


async def test_a_run_for_what_another_has_archived_by_now_keeps_it(
    service: Service, owner: Owner, archive: Archive, before: Fields, first: Before, tmp_path: Path
) -> None:
    other = archive_at(service, str(tmp_path / "archive"))
    first("rm_archive_begin_v1", 1, lambda: other.archive_old(owner, NOW_S, SPRING))
    assert await archive.archive_old(owner, NOW_S, SPRING) == {}
    assert [item.count for item in await archive.quarters(owner)] == [20]
    await archive.restore(owner)
    assert await stored(service, owner) == before


async def test_a_restore_from_files_that_were_replaced_brings_back_what_is_new(
    service: Service, owner: Owner, archive: Archive, before: Fields, first: Before, tmp_path: Path
) -> None:
    async def change() -> None:
        other = archive_at(service, str(tmp_path / "archive"))
        await other.restore(owner)
        await service.writer.update(owner, "old3", MemoryPatch(importance=0.9))
        await other.archive_old(owner, NOW_S, SPRING)

    await archive.archive_old(owner, NOW_S, SPRING)
    first("rm_restore_v1", 1, change)
    assert await archive.restore(owner) == {SPRING: 20}
    assert (await service.browser.get(owner, "old3")).importance == 0.9
