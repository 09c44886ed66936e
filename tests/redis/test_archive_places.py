"""Where an archive may lie, whose it is, and the commands that work on it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from redismem.archive import Archive
from redismem.cli import main
from redismem.errors import Misconfigured
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput
from tests.redis.test_archive import NOW_S, OLD, SPRING, WINTER, after, archive_at, fill, stored


@pytest.fixture
def archive(service: Service, tmp_path: Path) -> Archive:
    return archive_at(service, str(tmp_path / "archive"))


async def test_odd_users_have_folders_of_their_own(
    service: Service, archive: Archive, tmp_path: Path
) -> None:
    users = [
        "a/b",
        "a%2Fb",
        "a",
        "A",
        "..",
        ".",
        "%",
        "ü",
        "ü" * 256,
        "ü" * 255 + "u",
        "~",
        "*?[x]",
        "store.json",
        "\n",
    ]
    for number, user in enumerate(users):
        owner = service.owner(user)
        memory = MemoryInput(id="same", text=f"zebra of user{number}", event_date=OLD)
        await service.writer.put(owner, [memory])
        assert await archive.archive_old(owner, NOW_S) == {SPRING: 1}
    spaced = Owner("b", "a")  # of namespace a
    await service.writer.put(spaced, [MemoryInput(id="same", text="zebra of namespace", event_date=OLD)])
    await archive.archive_old(spaced, NOW_S)
    folders = [path.name for path in (tmp_path / "archive").iterdir() if path.is_dir()]
    assert len({name.lower() for name in folders}) == len(users) + 1
    assert max(len(name.encode()) for name in folders) <= 255
    assert os.listdir(tmp_path) == ["archive"]  # noqa: PTH208  # one name
    for number, user in enumerate(users):
        owner = service.owner(user)
        assert await archive.restore(owner) == {SPRING: 1}
        assert (await service.browser.get(owner, "same")).text == f"zebra of user{number}"


async def test_odd_ids_come_back(service: Service, owner: Owner, archive: Archive) -> None:
    ids = ["a b", "a/b", "..", "%00", "ü☃", "}:{x", "*", '"', "\\n", "x" * 256]
    memories = [MemoryInput(id=memory_id, text=f"zebra {memory_id}", event_date=OLD) for memory_id in ids]
    await service.writer.put(owner, memories)
    before = await stored(service, owner)
    assert set(before) == set(ids)
    assert await archive.archive_old(owner, NOW_S) == {SPRING: len(ids)}
    assert await archive.restore(owner) == {SPRING: len(ids)}
    assert await stored(service, owner) == before


async def test_any_fsspec_url_will_do(service: Service, owner: Owner, tmp_path: Path) -> None:
    for url in (f"memory://redismem-{time.time_ns()}/deep", f"file://{tmp_path}/with space"):
        archive = archive_at(service, url)
        await fill(service, owner, 30)
        before = await stored(service, owner)
        assert set(await archive.archive_old(owner, NOW_S, SPRING)) == {SPRING}
        await service.writer.put(owner, [MemoryInput(id="late", text="zebra", event_date=OLD)])
        assert await archive.archive_old(owner, NOW_S, SPRING) == {SPRING: 1}
        await service.writer.delete(owner, "late")
        assert await archive.purge(owner) == 1
        assert [item.count for item in await archive.quarters(owner)] == [15]
        assert await archive_at(service, url).restore(owner) == {SPRING: 15}
        assert await stored(service, owner) == before
        assert await archive.forget(owner) == 15
        assert await archive.quarters(owner) == []
        ids = await service.client.execute("ZRANGE", owner.ids, 0, -1)
        for raw in ids:
            await service.writer.delete(owner, raw.decode())


async def test_what_cannot_be_an_archive_is_refused(service: Service, owner: Owner, tmp_path: Path) -> None:
    nowhere = archive_at(service, "")
    assert not nowhere.is_configured
    for call in (nowhere.archive_old(owner, NOW_S), nowhere.restore(owner), nowhere.purge(owner)):
        with pytest.raises(Misconfigured, match="REDISMEM_ARCHIVE_URL"):
            await call
    for call in (nowhere.forget(owner), nowhere.quarters(owner)):
        with pytest.raises(Misconfigured, match="REDISMEM_ARCHIVE_URL"):
            await call
    (tmp_path / "file").touch()
    for url in ("nosuch://x", f"{tmp_path}/file/archive", "/proc/archive"):
        with pytest.raises(Misconfigured, match="REDISMEM_ARCHIVE_URL"):
            await archive_at(service, url).check()
    url = str(tmp_path / "archive")
    assert archive_at(service, url).is_configured
    assert await archive_at(service, url).quarters(owner) == []
    await service.client.execute("HSET", "redismem:store", "archive", "another store")
    with pytest.raises(Misconfigured, match="another store"):
        await archive_at(service, url).quarters(owner)


async def test_the_commands_do_it_for_all_users_or_one(
    service: Service, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"REDIS_URL": redis_url, "EMBEDDER": "deterministic", "TESTING": "1"}.items():
        monkeypatch.setenv(f"REDISMEM_{name}", value)
    for user in ("ann", "bob"):
        await fill(service, service.owner(user), 12)

    def run(*args: str) -> Any:
        return CliRunner().invoke(main, ["archive", *args])

    async def ran(*args: str) -> str:
        result = await asyncio.to_thread(run, *args)
        assert result.exit_code == 0, result.output
        return str(result.output)

    refused = await asyncio.to_thread(run, "run")
    assert (refused.exit_code, "REDISMEM_ARCHIVE_URL" in refused.output) == (1, True)
    monkeypatch.setenv("REDISMEM_ARCHIVE_URL", str(tmp_path / "archive"))
    monkeypatch.setenv("REDISMEM_ARCHIVE_AFTER_QUARTERS", str(after()))
    assert f"{SPRING}: 6 memories archived\n" in await ran("run", "-u", "ann", "--quarter", SPRING)
    assert "archived: 14 memories" in await ran("run")
    shown = await ran("list")
    assert all(word in shown for word in ("ann", "bob", SPRING, WINTER))
    rows = msgspec.json.decode(await ran("list", "-u", "bob", "--json"))
    assert [(row["owner"], row["quarter"], row["count"]) for row in rows] == [
        ("bob", SPRING, 6),
        ("bob", WINTER, 4),
    ]
    (manifest,) = [
        item
        for item in await archive_at(service, str(tmp_path / "archive")).quarters(Owner("ann"))
        if item.quarter == WINTER
    ]
    path = tmp_path / "archive" / "ann" / manifest.file
    packed = path.read_bytes()
    path.write_bytes(packed[:-1])
    failed = await asyncio.to_thread(run, "restore", "--quarter", WINTER)
    assert (failed.exit_code, f"ann: {manifest.file} is not" in failed.output) == (1, True)
    assert "restored: 4 memories" in failed.output  # the other's
    path.write_bytes(packed)
    assert "restored: 6 memories" in await ran("restore", "-u", "bob")
    assert "purged: 10 memories" in await ran("purge")
    assert "restored: 4 memories" in await ran("restore", "--quarter", WINTER)
