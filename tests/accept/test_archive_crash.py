"""A process that archives, restores or purges is killed at each of its steps, and Redis in the middle of it.

Run as a program, this file is that process: it forks one for each line `action step late` of its input, which
kills itself at that step, and prints whether it came so far.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redismem import archivelines, archiverun
from redismem.archive import Archive
from redismem.client import Client
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embedded import EmbeddedRedis
from redismem.errors import RedisMemError
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.types import MemoryInput
from tests.redis.test_archive import NOW_S, OLD, SPRING, Fields, archived, fill, of, on_disk, stored
from tests.redis.test_archive_faults import STEPS, check_whole, watched

pytestmark = pytest.mark.accept

ROOT = Path(__file__).parents[2]
OWNER = Owner("alice")
#: memories a part: a small test has several parts
PART = 8

Kill = Callable[[str, int, bool], Awaitable[bool]]


def small_parts(patch: Any) -> None:
    patch(archivelines, "PART", PART)
    patch(archiverun, "PART", PART)


async def act(settings: Settings, action: str) -> None:
    client = Client(settings, settings.redis_url)
    archive = Archive(Functions(client), settings, DeterministicEmbedder())
    if action == "archive":
        await archive.archive_old(OWNER, NOW_S, SPRING)
    elif action == "restore":
        await archive.restore(OWNER)
    else:
        await archive.purge(OWNER)
    await client.close()


def die_at(number: int, *, late: bool) -> None:
    """Kill this process at its n-th step, before it is done or `late`, after; in a write, at half or all."""
    steps, write = itertools.count(1), archivelines.Draft._write

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def step() -> Iterator[None]:
        is_due = next(steps) == number
        if is_due and not late:
            die()
        yield
        if is_due:
            die()

    def write_some(draft: archivelines.Draft, data: bytes) -> None:
        is_due = next(steps) == number
        write(draft, data if late or not is_due else data[: len(data) // 2])
        if is_due:
            draft._file.flush()
            die()

    for kind, name in STEPS:
        setattr(kind, name, watched(getattr(kind, name), step))
    archivelines.Draft._write = write_some  # type: ignore[method-assign]  # this process serves one step


def main() -> None:
    settings = Settings(redis_url=sys.argv[1], archive_url=sys.argv[2])
    small_parts(setattr)
    for line in sys.stdin:
        action, number, late = line.split()
        if (pid := os.fork()) == 0:
            die_at(int(number), late=late == "True")
            asyncio.run(act(settings, action))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print({-signal.SIGKILL: "killed", 0: "done"}.get(status, f"failed {status}"), flush=True)


@pytest.fixture
async def kill(redis_url: str, tmp_path: Path) -> AsyncIterator[Kill]:
    """Let a process do something and kill it at a step; tell whether it came so far."""
    process = subprocess.Popen(
        [sys.executable, __file__, redis_url, str(tmp_path / "archive")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process as running:
        assert running.stdin is not None
        assert running.stdout is not None
        reading, writing = running.stdout, running.stdin

        async def one(action: str, number: int, late: bool) -> bool:
            writing.write(f"{action} {number} {late}\n")
            writing.flush()
            outcome = (await asyncio.to_thread(reading.readline)).strip()
            assert outcome in ("killed", "done"), outcome
            return outcome == "killed"

        yield one


@pytest.fixture
def archive(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    small_parts(monkeypatch.setattr)
    settings = replace(service.settings, archive_url=str(tmp_path / "archive"))
    return Archive(service.functions, settings, service.embedder)


@pytest.fixture
async def before(service: Service) -> Fields:
    await fill(service, OWNER, 40)
    return await stored(service, OWNER)


@pytest.mark.parametrize("late", [False, True])
async def test_a_kill_while_archiving_loses_nothing(
    service: Service, archive: Archive, before: Fields, kill: Kill, tmp_path: Path, late: bool
) -> None:
    step = 1
    while await kill("archive", step, late):
        await check_whole(service, OWNER, before)
        await archive.restore(OWNER)  # whatever is archived at this point can be restored
        assert await stored(service, OWNER) == before
        await kill("archive", step, late)
        await archive.archive_old(OWNER, NOW_S, SPRING)
        await archive.purge(OWNER)
        assert await archived(service, OWNER) == of(before, "old")
        assert [item.count for item in await archive.quarters(OWNER)] == [20]
        assert len(list((tmp_path / "archive" / "alice").iterdir())) == 2
        await archive.restore(OWNER)
        assert await stored(service, OWNER) == before
        step += 1
    assert step > 20


@pytest.mark.parametrize("late", [False, True])
async def test_a_kill_while_restoring_loses_nothing(
    service: Service, archive: Archive, before: Fields, kill: Kill, late: bool
) -> None:
    await archive.archive_old(OWNER, NOW_S, SPRING)
    step = 1
    while await kill("restore", step, late):
        await check_whole(service, OWNER, before)
        await archive.restore(OWNER)
        assert await stored(service, OWNER) == before
        await archive.archive_old(OWNER, NOW_S, SPRING)
        step += 1
    assert step > 6


@pytest.mark.parametrize("late", [False, True])
async def test_a_kill_while_purging_loses_nothing_and_spares_nothing(
    service: Service, archive: Archive, before: Fields, kill: Kill, tmp_path: Path, late: bool
) -> None:
    async def prepare() -> None:
        await service.writer.put(OWNER, [MemoryInput(id="secret", text="zebra secret", event_date=OLD)])
        await archive.archive_old(OWNER, NOW_S, SPRING)
        await service.writer.delete(OWNER, "secret")
        assert b"secret" in on_disk(tmp_path)

    await prepare()
    step = 1
    while await kill("purge", step, late):
        await check_whole(service, OWNER, before)
        await archive.purge(OWNER)
        assert b"secret" not in on_disk(tmp_path)
        assert await archived(service, OWNER) == of(before, "old")
        await prepare()
        step += 1
    assert step > 15
    await archive.restore(OWNER)
    assert await stored(service, OWNER) == before


@pytest.mark.parametrize("function", ["rm_records_ro_v1", "rm_archive_v1", "rm_restore_v1"])
async def test_a_kill_of_redis_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    small_parts(monkeypatch.setattr)
    calls = itertools.count(1)
    call = Functions.call

    async def killing(self: Functions, name: str, *args: Any, **options: Any) -> Any:
        if name == function and next(calls) == 2:
            assert redis.pid is not None
            os.kill(redis.pid, signal.SIGKILL)
        return await call(self, name, *args, **options)

    data_dir = tmp_path / "redis"
    settings = Settings(
        embedder="deterministic", testing=True, archive_url=str(tmp_path / "archive"), redis_timeout_s=1
    )
    async with (
        EmbeddedRedis(data_dir) as redis,
        open_service(replace(settings, redis_url=redis.url)) as service,
    ):
        await fill(service, OWNER, 40)
        before = await stored(service, OWNER)
        archive = Archive(service.functions, service.settings, service.embedder)
        monkeypatch.setattr(Functions, "call", killing)
        with pytest.raises(RedisMemError):  # noqa: PT012  # whichever of the two it is
            await archive.archive_old(OWNER, NOW_S)
            await archive.restore(OWNER)
        monkeypatch.setattr(Functions, "call", call)
    async with (
        EmbeddedRedis(data_dir) as redis,
        open_service(replace(settings, redis_url=redis.url)) as service,
    ):
        archive = Archive(service.functions, service.settings, service.embedder)
        await check_whole(service, OWNER, before)
        await archive.archive_old(OWNER, NOW_S, SPRING)
        await archive.restore(OWNER)
        assert await stored(service, OWNER) == before


if __name__ == "__main__":
    main()
