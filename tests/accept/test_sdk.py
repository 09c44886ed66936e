"""The Python client and a real service: streams in parts, clients that leave, a service that ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from redismem.errors import NotFound, Unavailable
from redismem.sdk import Client
from tests.accept.conftest import Running, Start, is_running, redis_pid
from tests.conftest import until

pytestmark = pytest.mark.accept

#: seconds of an embedding, long beside everything else
EMBED_S = 0.8

#: memories that are added while the service ends and comes back
MEMORIES = 60


def client_of(running: Running) -> Client:
    return Client(str(running.http.base_url), timeout_s=30)


def connections(client: Client) -> list[object]:
    transport = client._calls._http._transport
    assert isinstance(transport, httpx.AsyncHTTPTransport)
    return list(transport._pool.connections)


async def test_a_stage_is_there_before_the_next_is_made(start: Start) -> None:
    async with client_of(await start(embed_s=EMBED_S)) as client:
        ada = client.user("ada")
        await ada.add("Ada keeps bees")
        began_s, at_s = time.monotonic(), dict[int, float]()
        async with ada.stream_context("Where are the bees?", stages=2) as stages:
            async for stage in stages:
                at_s[stage.stage] = time.monotonic() - began_s
        assert at_s[1] < EMBED_S <= at_s[2]


async def test_a_stream_leaves_its_connection_to_the_next_request(start: Start) -> None:
    async with client_of(await start()) as client:
        ada = client.user("ada")
        await ada.search("bees")
        first = connections(client)
        for _ in range(3):
            await ada.stream_context("bees").whole()
            await ada.search("bees")
        assert connections(client) == first


async def test_leaving_a_stream_ends_the_work_for_it(start: Start) -> None:
    async with client_of(await start(embed_s=EMBED_S)) as client:
        ada = client.user("ada")
        async with ada.stream_context("Where are the bees?") as stages:
            assert (await anext(stages)).stage == 1
        # it began later, and is embedded as long
        await ada.context("Where are the wasps?", stages=2)
        counts = (await client.stats()).contexts
        assert counts["contexts"] == 1


async def test_two_users_of_one_client_do_not_wait_for_each_other(start: Start) -> None:
    async with client_of(await start(embed_s=EMBED_S)) as client:
        stream = client.user("ada").stream_context("Where are the bees?")
        await anext(stream)
        began_s = time.monotonic()
        await client.user("eve").context(stages=1)
        assert time.monotonic() - began_s < EMBED_S
        await stream.whole()


# a service that ends and comes back ---------------------------------------------------------------


class Service:
    """`redismem serve` on the test's data directory, always at the same port."""

    def __init__(self, data_dir: Path, log: Path) -> None:
        self._data_dir, self._log = data_dir, log
        self._port = 0
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    async def begin(self) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
        environ |= {"REDISMEM_DATA_DIR": str(self._data_dir), "REDISMEM_TESTING": "1"}
        environ |= {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_WORKER": "false"}
        command = [sys.executable, "-m", "redismem", "serve", "--port", str(self._port)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        with self.process.stdout as output:
            line = await asyncio.to_thread(output.readline)
        assert line, self._log.read_text()
        self.url = line.split()[2].rstrip(",")
        self._port = int(self.url.rpartition(":")[2])

    async def end(self, how: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        await asyncio.to_thread(self.process.wait, 30)
        pid = redis_pid(self._data_dir)
        await until("Redis has ended", lambda: asyncio.sleep(0, not is_running(pid)), 15)


@pytest.fixture
async def served(data_dir: Path, tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(data_dir, tmp_path / "service.log")
    await service.begin()
    yield service
    await service.end(signal.SIGKILL)


async def test_calls_that_find_nobody_succeed_when_the_service_is_back(served: Service) -> None:
    async with Client(served.url, timeout_s=60, retries=100) as client:
        ada = client.user("ada")
        session = await ada.open_session()
        await ada.add("Ada keeps bees")
        await served.end(signal.SIGTERM)
        assert not await client.ready()
        said = asyncio.create_task(session.say("Where are they?"))
        changed = asyncio.create_task(ada.update("nobody", pinned=True))
        context = asyncio.create_task(ada.stream_context("bees", stages=2).whole())
        with pytest.raises(Unavailable):
            async with Client(served.url, retries=1) as hasty:
                await hasty.user("ada").search("bees")
        assert not any(call.done() for call in (said, changed, context))
        await served.begin()
        assert (await said).messages == 1
        with pytest.raises(NotFound):  # told by the service: what cannot have been received is repeated too
            await changed
        assert "bees" in (await context).text


async def test_memories_that_are_added_over_a_crash_are_each_stored_once(served: Service) -> None:
    async with Client(served.url, timeout_s=60, retries=100) as client:
        ada = client.user("ada")
        session = await ada.open_session()
        done = asyncio.Event()

        async def tell(lane: int) -> None:
            for number in range(MEMORIES // 4):
                if number == 3:
                    done.set()
                await ada.add(f"bee {lane} {number}")
                await session.say(f"wasp {lane} {number}")

        lanes = [asyncio.create_task(tell(lane)) for lane in range(4)]
        await done.wait()
        await served.end(signal.SIGKILL)
        await served.begin()
        await asyncio.gather(*lanes)
        texts = [memory.text async for memory in ada.list()]
        assert len(texts) == len(set(texts)) == 2 * MEMORIES
