"""Real processes that stop listening: bypassed while they are deaf, back by themselves."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import httpx
import pytest

from redismem.client import Client
from redismem.keys import Owner
from tests.accept.conftest import Running, Start, memory_path
from tests.conftest import until

pytestmark = pytest.mark.accept

OWNER = Owner("alice")


async def stats(service: Running) -> dict[str, object]:
    told: dict[str, object] = (await service.http.get("/v1/stats")).json()["coherence"]
    return told


async def warmed(service: Running, memory_id: str) -> None:
    """Read a memory until L1 has it."""

    async def hit() -> bool:
        await service.http.get(memory_path(memory_id))
        return bool((await service.http.get("/v1/stats")).json()["l1"]["memory"]["hits"])

    await until("L1 has the memory", hit)


async def listeners(redis: Client) -> int:
    """Return how many push connections stand."""
    return (await redis.execute("CLIENT", "LIST", "TYPE", "PUBSUB")).count(b"name=redismem-push")


@pytest.mark.parametrize("strong", ["delete", "strong update"])
async def test_a_process_that_cannot_keep_up_is_cut_off_serves_nothing_old_and_comes_back(
    start: Start, redis: Client, strong: str
) -> None:
    first, second = await start(), await start()
    stored = await first.http.post("/v1/users/alice/memories", json={"id": "a", "text": "likes tea"})
    assert stored.status_code == 201
    await warmed(second, "a")
    await redis.execute("CONFIG", "SET", "client-output-buffer-limit", "pubsub 65536 65536 1")

    second.process.send_signal(signal.SIGSTOP)
    try:

        async def flooded() -> bool:
            writes = [("HSET", OWNER.memory(f"flood {i}"), "text", "much") for i in range(1000)]
            await redis.pipeline(writes)
            return await listeners(redis) == 1

        await until("the deaf process is cut off", flooded, 60)
        if strong == "delete":
            reply = await first.http.delete(memory_path("a"))
        else:
            reply = await first.http.patch(
                memory_path("a"), params={"consistency": "strong"}, json={"text": "likes coffee"}
            )
        assert reply.status_code == 200
    finally:
        second.process.send_signal(signal.SIGCONT)
    seen = await second.http.get(memory_path("a"))
    if strong == "delete":
        assert seen.status_code == 404
    else:
        assert seen.json()["text"] == "likes coffee"

    async def back() -> bool:
        told = await stats(second)
        return told["live"] is True and told["connections"] == 2

    await until("it listens again", back)


async def test_functions_and_connections_that_vanish_are_made_again(start: Start, redis: Client) -> None:
    service = await start()
    await service.http.post("/v1/users/alice/memories", json={"id": "a", "text": "likes tea"})
    await warmed(service, "a")
    for command in ("FUNCTION FLUSH", "SCRIPT FLUSH", "CLIENT KILL TYPE NORMAL SKIPME yes"):
        await redis.execute(*command.split())

        async def serves(text: str = command) -> bool:
            reply = await service.http.post("/v1/users/alice/search", json={"text": text})
            # a new connection that takes longer than 0.25 s is told as 503
            return reply.status_code == 200 and bool(reply.json()["total"] == 1)

        await until(f"it serves after {command}", serves)
    await redis.execute("CLIENT", "KILL", "TYPE", "PUBSUB")

    async def live() -> bool:
        return (await stats(service))["connections"] == 2 and (await stats(service))["live"] is True

    await until("it listens again", live)
    assert (await service.http.delete(memory_path("a"))).status_code == 200
    assert (await service.http.get(memory_path("a"))).status_code == 404


async def test_a_service_whose_redis_hangs_refuses_at_once_and_goes_on_by_itself(
    start: Start, redis: Client
) -> None:
    service = await start()
    pid = int((await redis.execute("INFO", "server")).split(b"process_id:")[1].split(b"\r\n")[0])
    service.http.timeout = httpx.Timeout(20)

    os.kill(pid, signal.SIGSTOP)
    try:

        async def refused() -> bool:
            reply = await service.http.get(memory_path("none"))
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            return (await service.http.get("/health/ready")).status_code == 503

        await until("it is noticed", refused, 20)
        started = asyncio.get_running_loop().time()
        replies = await asyncio.gather(*(service.http.get(memory_path("none")) for _ in range(100)))
        assert {reply.status_code for reply in replies} == {503}
        # one call waits 2 s; a hundred that pile up would wait far longer than a hundred refusals
        assert asyncio.get_running_loop().time() - started < 20
        assert (await service.http.get("/health/live")).status_code == 200
    finally:
        os.kill(pid, signal.SIGCONT)

    async def ready() -> bool:
        with suppress(httpx.TransportError):
            return (await service.http.get("/health/ready")).status_code == 200
        return False

    await until("it serves again", ready, 20)
