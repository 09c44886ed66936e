"""The archive when something goes wrong: at any point a memory is in Redis or in a verified file."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from redismem import archivelines, archiverun
from redismem.archive import Archive
from redismem.archivefiles import Files
from redismem.archivelines import Draft
from redismem.archiverun import Run
from redismem.client import Client
from redismem.errors import ArchiveDamaged, Conflict, Unavailable
from redismem.keys import VECTOR_FIELDS, Owner
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
    on_disk,
    stored,
    words,
)

Meanwhile = Callable[[Callable[[], Awaitable[object]]], None]


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
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Do something between the manifest and the first removal, once."""
    take_out = Run._take_out

    def arrange(work: Callable[[], Awaitable[object]]) -> None:
        async def after_work(self: Run, *args: Any) -> Any:
            monkeypatch.setattr(Run, "_take_out", take_out)
            await work()
            return await take_out(self, *args)

        monkeypatch.setattr(Run, "_take_out", after_work)

    return arrange


async def check_whole(service: Service, owner: Owner, before: Fields) -> None:
    """Check that each memory is in Redis as it was, or archived, and not both."""
    live, gone = await stored(service, owner), await archived(service, owner)
    assert live.keys() | gone == before.keys()
    assert not live.keys() & gone
    assert {memory_id: before[memory_id] for memory_id in live} == live


STEPS = (
    *((Client, name) for name in ("execute", "pipeline")),
    *(
        (Files, name)
        for name in ("names", "manifests", "draft", "finished", "save", "copy", "remove", "_put")
    ),
    (Draft, "add"),
)

#: set where steps count: other tasks use the same client
_counted: ContextVar[bool] = ContextVar("counted", default=False)


@contextmanager
def cut(number: int, *, late: bool) -> Iterator[Callable[[], bool]]:
    """Fail at the n-th step of the block, before it is done or `late`, after; tells whether it came there."""
    steps, reached = itertools.count(1), []
    token = _counted.set(True)

    @contextmanager
    def step() -> Iterator[None]:
        if is_due := _counted.get() and next(steps) == number:
            reached.append(number)
        if is_due and not late:
            raise Unavailable("cut")
        yield
        if is_due:
            raise Unavailable("cut")

    def cutting(call: Any) -> Any:
        async def awaited(*args: Any, **options: Any) -> Any:
            with step():
                return await call(*args, **options)

        def called(*args: Any, **options: Any) -> Any:
            with step():
                return call(*args, **options)

        return awaited if asyncio.iscoroutinefunction(call) else called

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in STEPS:
            patch.setattr(kind, name, cutting(getattr(kind, name)))
        yield lambda: bool(reached)
    _counted.reset(token)


async def cuts(
    work: Callable[[], Awaitable[object]], check: Callable[[], Awaitable[None]], *, late: bool
) -> int:
    """Do the work as often as it has steps, another of them failing each time; return how many there are."""
    for number in itertools.count(1):
        with cut(number, late=late) as reached:
            try:
                await work()
            except Unavailable:
                failed = True
            else:
                failed = False
        if not reached():
            return number - 1
        assert failed, f"step {number} failed unseen"
        await check()
    raise AssertionError


@pytest.mark.parametrize("late", [False, True])
async def test_archiving_can_be_cut_at_every_step(
    service: Service, owner: Owner, archive: Archive, before: Fields, tmp_path: Path, late: bool
) -> None:
    async def work() -> object:
        return await archive.archive_old(owner, NOW_S, SPRING)

    async def check() -> None:
        await check_whole(service, owner, before)
        await work()  # goes on where it was cut
        assert await archived(service, owner) == of(before, "old")
        assert [item.count for item in await archive.quarters(owner)] == [20]
        assert len(list((tmp_path / "archive" / "alice").iterdir())) == 2
        await archive.restore(owner)
        assert await stored(service, owner) == before

    assert await cuts(work, check, late=late) > 20


@pytest.mark.parametrize("late", [False, True])
async def test_a_merge_can_be_cut_at_every_step(
    service: Service, owner: Owner, archive: Archive, before: Fields, late: bool
) -> None:
    some = [f"old{i}" for i in range(10)]
    for memory_id in some:
        await service.client.execute("EXPIRE", owner.memory(memory_id), 1000)

    async def some_stay(seconds: int) -> None:
        for memory_id in some:
            await service.client.execute(
                "EXPIRE" if seconds else "PERSIST", owner.memory(memory_id), *[1000][:seconds]
            )

    async def prepare() -> None:
        await some_stay(1)
        assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 10}
        await some_stay(0)

    async def work() -> object:
        return await archive.archive_old(owner, NOW_S, SPRING)

    async def check() -> None:
        await check_whole(service, owner, before)
        await work()
        assert await archived(service, owner) == of(before, "old")
        assert [item.count for item in await archive.quarters(owner)] == [20]
        await archive.restore(owner)
        assert await stored(service, owner) == before
        await prepare()

    await prepare()
    assert await cuts(work, check, late=late) > 25


@pytest.mark.parametrize("late", [False, True])
async def test_restoring_can_be_cut_at_every_step(
    service: Service, owner: Owner, archive: Archive, before: Fields, late: bool
) -> None:
    await archive.archive_old(owner, NOW_S, SPRING)

    async def check() -> None:
        await check_whole(service, owner, before)
        await archive.restore(owner)
        assert await stored(service, owner) == before
        assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 20}

    assert await cuts(lambda: archive.restore(owner), check, late=late) > 6


@pytest.mark.parametrize("late", [False, True])
async def test_purging_can_be_cut_at_every_step(
    service: Service, owner: Owner, archive: Archive, before: Fields, tmp_path: Path, late: bool
) -> None:
    async def prepare() -> None:
        await service.writer.put(owner, [MemoryInput(id="secret", text="zebra secret", event_date=OLD)])
        await archive.archive_old(owner, NOW_S, SPRING)
        await service.writer.delete(owner, "secret")
        assert b"secret" in on_disk(tmp_path)

    async def check() -> None:
        await check_whole(service, owner, before)
        await archive.purge(owner)
        assert b"secret" not in on_disk(tmp_path)
        assert await archived(service, owner) == of(before, "old")
        await prepare()

    await prepare()
    assert await cuts(lambda: archive.purge(owner), check, late=late) > 12
    await archive.restore(owner)
    assert await stored(service, owner) == before


async def test_what_changes_after_the_file_was_written_stays(
    service: Service, owner: Owner, archive: Archive, before: Fields, meanwhile: Meanwhile
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

    meanwhile(change)
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
    assert await archived(service, owner) == of(before, "old") - gone
    with monkeypatch.context() as patch:
        patch.setattr(archive._functions, "call", deleting)
        await archive.restore(owner)
    await archive.purge(owner)
    assert len(gone) >= 8
    assert (await stored(service, owner)).keys() == before.keys() - gone
    assert await archived(service, owner) == set()


def flipped(raw: bytes) -> bytes:
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("file", flipped),
        ("file", lambda raw: raw[:-9]),
        ("file", lambda raw: raw + b"\n"),
        ("file", lambda raw: raw[:0]),
        ("file", None),
        ("name", flipped),
        ("name", lambda raw: raw[:50]),
        ("name", lambda raw: raw.replace(b"alice", b"bob")),
        ("name", None),
    ],
)
async def test_damage_is_told_and_costs_nothing_else(
    service: Service,
    owner: Owner,
    archive: Archive,
    before: Fields,
    tmp_path: Path,
    kind: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    await archive.archive_old(owner, NOW_S, SPRING)
    (item,) = await archive.quarters(owner)
    path = tmp_path / "archive" / "alice" / getattr(item, kind)
    raw = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(raw))
    with pytest.raises(ArchiveDamaged):
        await archive.restore(owner)
    assert await words(service, owner) == SPRING.encode()
    assert await archived(service, owner) == of(before, "old")
    assert await archive.archive_old(owner, NOW_S, WINTER) == {WINTER: 13}  # another quarter
    await service.writer.put(owner, [MemoryInput(id="late", text="zebra", event_date=OLD)])
    with pytest.raises(ArchiveDamaged):
        await archive.archive_old(owner, NOW_S)
    with suppress(ArchiveDamaged):  # it looks only at files that need a change
        await archive.purge(owner)
    await service.writer.delete(owner, "late")
    await check_whole(service, owner, before)
    path.write_bytes(raw)
    await archive.restore(owner)
    assert await stored(service, owner) == before


async def test_a_lost_file_holds_back_only_its_own_memories(
    service: Service, owner: Owner, archive: Archive, before: Fields, tmp_path: Path
) -> None:
    await archive.archive_old(owner, NOW_S)
    spring, _ = await archive.quarters(owner)
    (tmp_path / "archive" / "alice" / spring.file).unlink()
    assert await archive.restore(owner, WINTER) == {WINTER: 13}
    for memory_id in of(before, "old"):
        await service.writer.delete(owner, memory_id)
    await archive.purge(owner)
    assert await archive.quarters(owner) == []
    assert await words(service, owner) is None


async def forget_in_redis(service: Service, owner: Owner) -> None:
    done = 0
    while not done:
        keys, names = [owner.index, *owner.written], [owner.physical_index(name) for name in VECTOR_FIELDS]
        done = (await service.functions.call("rm_forget_v1", keys, owner.memory_prefix, 500, *names))[3]


async def test_a_forget_meanwhile_leaves_nothing_anywhere(
    service: Service, owner: Owner, archive: Archive, before: Fields, meanwhile: Meanwhile, tmp_path: Path
) -> None:
    async def forget() -> None:
        await forget_in_redis(service, owner)
        await archive.forget(owner)

    meanwhile(forget)
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
        assert {type(outcome) for outcome in outcomes} <= {dict, int, Conflict, ArchiveDamaged}, outcomes
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
