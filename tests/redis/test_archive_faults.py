"""The archive when something goes wrong: at any point a memory is in Redis or in a verified file."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from redismem import archivelines, archiverun
from redismem.archive import Archive
from redismem.archivefiles import Files
from redismem.archivelines import Draft
from redismem.client import Client
from redismem.errors import ArchiveDamaged, Unavailable
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput
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


def watched(call: Any, step: Callable[[], AbstractContextManager[None]]) -> Any:
    """Return a call, of a coroutine or not, that runs in a step."""

    async def awaited(*args: Any, **options: Any) -> Any:
        with step():
            return await call(*args, **options)

    def called(*args: Any, **options: Any) -> Any:
        with step():
            return call(*args, **options)

    return awaited if asyncio.iscoroutinefunction(call) else called


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

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in STEPS:
            patch.setattr(kind, name, watched(getattr(kind, name), step))
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
        await archive.purge(owner)
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
    some = [f"old{i}" for i in range(10, 20)]

    async def prepare() -> None:
        """Archive ten, ten more come."""
        for memory_id in some:
            await service.client.execute("EXPIRE", owner.memory(memory_id), 1000)
        assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 10}
        for memory_id in some:
            await service.client.execute("PERSIST", owner.memory(memory_id))

    async def work() -> object:
        return await archive.archive_old(owner, NOW_S, SPRING)

    async def check() -> None:
        await check_whole(service, owner, before)
        await work()
        await archive.purge(owner)
        assert await archived(service, owner) == of(before, "old")
        assert [item.count for item in await archive.quarters(owner)] == [20]
        await archive.restore(owner)
        assert await stored(service, owner) == before
        await prepare()

    await prepare()
    assert await cuts(work, check, late=late) > 20


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
