"""The worker that `redismem serve` runs: it is there, it comes back, and it leaves with the service."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from redismem.client import Client
from redismem.embedded import EmbeddedRedis
from redismem.keys import COHERENCE_CHANNEL, LEASES
from redismem.settings import Settings
from tests.accept.conftest import is_running, redis_pid
from tests.conftest import until

pytestmark = pytest.mark.accept

PROFILE = "/v1/users/ada/profile"


@dataclass
class Served:
    process: subprocess.Popen[str]
    http: httpx.AsyncClient

    def worker(self) -> int:
        """Return the pid of its worker; 0 while there is none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}").parent.glob("*/children")
        for pid in " ".join(path.read_text() for path in children).split():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and is_running(int(pid)):
                return int(pid)
        return 0

    async def add(self, text: str) -> None:
        reply = await self.http.post("/v1/users/ada/memories", json={"text": text, "importance": 0.9})
        assert reply.status_code == 201, reply.text

    async def tells(self, text: str) -> bool:
        return text in (await self.http.get(PROFILE)).json()["context_summary"]


@pytest.fixture
async def served(data_dir: Path) -> AsyncIterator[Served]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
    environ |= {"REDISMEM_DATA_DIR": str(data_dir), "REDISMEM_TESTING": "1"}
    environ |= {"REDISMEM_EMBEDDER": "deterministic", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "redismem", "serve", "--port", "0"]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        url = (await asyncio.to_thread(output.readline)).split()[2].rstrip(",")
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        yield Served(process, http)
    process.kill()
    await asyncio.to_thread(process.wait)
    pid = redis_pid(data_dir)
    await until("Redis has ended", lambda: asyncio.sleep(0, not is_running(pid)), 15)


async def test_the_worker_of_a_service_comes_back_and_leaves_with_it(served: Served) -> None:
    await served.add("Ada keeps bees")
    # it gives way to everything else on the cores
    await until("the profile is made", lambda: served.tells("bees"), 120)
    first = served.worker()
    assert os.getpriority(os.PRIO_PROCESS, first) > os.getpriority(os.PRIO_PROCESS, served.process.pid)
    os.kill(first, signal.SIGKILL)
    await served.add("Ada sails boats")
    await until("the profile is made by another worker", lambda: served.tells("boats"), 120)
    second = served.worker()
    assert second not in (0, first)
    served.process.kill()
    await until("the worker has ended", lambda: asyncio.sleep(0, not is_running(second)), 15)


async def test_no_delete_waits_for_a_worker(served: Served, data_dir: Path) -> None:
    """A process that may be busy computing must not be among those that a barrier waits for."""
    environ = os.environ | {"REDISMEM_REDIS_URL": EmbeddedRedis(data_dir).url, "REDISMEM_TESTING": "1"}
    environ |= {"REDISMEM_EMBEDDER": "deterministic", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "redismem", "worker"]
    other = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    client = Client(Settings(), EmbeddedRedis(data_dir).url)
    try:
        with other.stdout as output:
            assert "is at work" in await asyncio.to_thread(output.readline)
        await until("the service's worker is at work", lambda: listeners(client, 3), 120)
        assert len(await client.execute("HKEYS", LEASES)) == 1
    finally:
        other.kill()
        await asyncio.to_thread(other.wait)
        await client.close()


async def listeners(client: Client, count: int) -> bool:
    """Return whether so many processes hear what Redis pushes."""
    (_, heard) = await client.execute("PUBSUB", "NUMSUB", COHERENCE_CHANNEL)
    return bool(heard == count)


async def test_a_worker_ends_with_a_service_that_is_stopped(served: Served) -> None:
    await until("there is a worker", lambda: asyncio.sleep(0, served.worker()), 120)
    worker = served.worker()
    served.process.send_signal(signal.SIGTERM)
    await until("the service has ended", lambda: asyncio.sleep(0, served.process.poll() is not None), 30)
    assert not is_running(worker)
