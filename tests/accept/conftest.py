"""Real service processes on one data directory, started and ended by a test."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from redismem.client import Client
from redismem.embedded import EmbeddedRedis
from redismem.settings import Settings
from tests.accept import serve_child
from tests.accept.forked import Forked
from tests.conftest import until

USER = "/v1/users/alice"
#: a file in the folder of a test: while it is there, its services make no embeddings
HOLD = "hold"


@dataclass
class Running:
    """One service process and a client of it."""

    process: Forked
    http: httpx.AsyncClient
    data_dir: Path

    async def end(self, how: signal.Signals) -> int:
        """Send a signal to the process, unless it has ended, and return its status."""
        self.process.send_signal(how)
        await until("the service has ended", lambda: asyncio.sleep(0, self.process.poll() is not None), 20)
        status = self.process.poll()
        assert status is not None
        return status


Start = Callable[..., Awaitable[Running]]


def redis_pid(data_dir: Path) -> int:
    """Return the pid that the embedded server signed its lock with."""
    return int((data_dir / "server.lock").read_text())


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def start(data_dir: Path, tmp_path: Path) -> AsyncIterator[Start]:
    """Start a service on the test's data directory and wait until it is ready."""
    started: list[Running] = []

    async def one(embed_s: float = 0.0, redis_s: float = 0.0, **settings: object) -> Running:
        environ = {"REDISMEM_DATA_DIR": str(data_dir), "REDISMEM_TESTING": "1"}
        environ |= {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_REDIS_TIMEOUT_S": "2"}
        environ |= {"REDISMEM_OVERLOAD_MS": "0"}  # streams are many and slow on purpose
        environ |= {f"REDISMEM_{name.upper()}": str(value) for name, value in settings.items()}
        arguments = [str(embed_s), str(redis_s), str(tmp_path / HOLD)]
        process = Forked(serve_child.main, arguments, environ, tmp_path / f"service{len(started)}.log")
        port = await asyncio.to_thread(process.port)
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20)
        running = Running(process, http, data_dir)
        started.append(running)

        async def ready() -> bool:
            assert process.poll() is None, process.log.read_text()
            with suppress(httpx.TransportError):
                return (await running.http.get("/health/ready", timeout=1)).status_code == 200
            return False

        await until("the service is ready", ready, 30)
        return running

    yield one
    for running in reversed(started):
        await running.http.aclose()
        await running.end(signal.SIGKILL)
    if (data_dir / "server.lock").exists():  # the server ends with its owner
        pid = redis_pid(data_dir)
        await until("Redis has ended", lambda: asyncio.sleep(0, not is_running(pid)), 15)


@pytest.fixture
async def redis(data_dir: Path) -> AsyncIterator[Client]:
    """A connection of the test's own to the embedded server."""
    client = Client(Settings(), EmbeddedRedis(data_dir).url)
    yield client
    await client.close()


def memory_path(memory_id: str) -> str:
    return f"{USER}/memories/{quote(memory_id, safe='')}"


async def all_memories(http: httpx.AsyncClient) -> dict[str, dict[str, object]]:
    """Return every memory of the list, superseded ones too, by id."""
    found: dict[str, dict[str, object]] = {}
    query = "?superseded=include&limit=500"
    cursor = ""
    while True:
        reply = await http.get(f"{USER}/memories{query}{cursor}")
        assert reply.status_code == 200, reply.text
        page = reply.json()
        found |= {memory["id"]: memory for memory in page["memories"]}
        if "cursor" not in page:
            return found
        cursor = f"&cursor={page['cursor']}"


async def best_hits(http: httpx.AsyncClient, texts: list[str], mode: str) -> list[str | None]:
    """Return the id of the best hit for each text."""
    best: list[str | None] = []
    for first in range(0, len(texts), 50):
        queries = [{"text": text, "search_mode": mode, "limit": 1} for text in texts[first : first + 50]]
        reply = await http.post(f"{USER}/search/batch", json={"queries": queries})
        assert reply.status_code == 200, reply.text
        hits = [result["memories"] for result in reply.json()["results"]]
        best += [hit[0]["id"] if hit else None for hit in hits]
    return best
