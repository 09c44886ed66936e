from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from redismem.client import Client
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.lualib import Functions, loaded_versions, shipped_libraries
from redismem.reembed import Reembedder
from tests.accept.conftest import (
    USER,
    Running,
    Start,
    all_memories,
    best_hits,
    is_running,
    memory_path,
    redis_pid,
)
from tests.conftest import until

pytestmark = pytest.mark.accept

#: acknowledged memories after which the service is killed
ENOUGH = 800
#: seconds after which appendfsync everysec has written everything
IDLE_S = 1.2


async def written(http: httpx.AsyncClient, numbers: itertools.count[int], texts: dict[str, str]) -> None:
    """Write batches until the service is gone; note each acknowledged memory by its id."""
    while True:
        batch = [f"zebra unique{next(numbers)} word" for _ in range(25)]
        wait = "false" if next(numbers) % 2 else "true"
        body = {"memories": [{"text": text} for text in batch]}
        try:
            reply = await http.post(f"{USER}/memories?wait={wait}", json=body)
        except httpx.TransportError:
            return
        assert reply.status_code in (201, 202), reply.text
        texts |= {item["id"]: text for item, text in zip(reply.json()["memories"], batch, strict=True)}


async def test_a_kill_of_the_service_during_writes_loses_nothing(start: Start, redis: Client) -> None:
    first = await start(embed_s=0.02)
    texts: dict[str, str] = {}
    numbers = itertools.count()
    writers = [asyncio.create_task(written(first.http, numbers, texts)) for _ in range(4)]
    await until(f"{ENOUGH} memories are acknowledged", lambda: asyncio.sleep(0, len(texts) >= ENOUGH), 30)
    assert await first.end(signal.SIGKILL) == -signal.SIGKILL
    await asyncio.gather(*writers)

    second = await start()
    ids = list(texts)
    for memory_id in ids[::10]:
        memory = await second.http.get(memory_path(memory_id))
        assert memory.json()["text"] == texts[memory_id]
    listed = await all_memories(second.http)
    assert {memory_id: listed[memory_id]["text"] for memory_id in ids} == texts
    assert await best_hits(second.http, [text.split()[1] for text in texts.values()], "keyword") == ids

    waiting = {memory_id for memory_id, memory in listed.items() if not memory["embedded"]}
    assert waiting, "the kill came too late to test anything"
    made = await Reembedder(redis, Functions(redis), DeterministicEmbedder()).run()
    assert made == len(waiting)
    assert all(memory["embedded"] for memory in (await all_memories(second.http)).values())
    assert await best_hits(second.http, list(texts.values()), "semantic") == ids


async def changed(running: Running) -> dict[str, dict[str, object]]:
    """Write of every kind; return what is stored then, all of it embedded."""
    http = running.http
    turns = [{"id": f"t{i}", "text": f"Ana: turn number{i}", "session_id": "s"} for i in range(200)]
    assert (await http.post(f"{USER}/memories?wait=false", json={"memories": turns})).status_code == 202
    assert (await http.patch(memory_path("t3"), json={"text": "Ana: patched"})).status_code == 200
    assert (await http.delete(memory_path("t4"))).status_code == 200
    correction = {"ids": ["t5"], "memory": {"id": "new", "text": "Ana: corrected"}}
    assert (await http.post(f"{USER}/corrections", json=correction)).status_code == 201

    async def embedded() -> bool:
        return all(memory["embedded"] for memory in (await all_memories(http)).values())

    await until("everything is embedded", embedded)
    return await all_memories(http)


async def test_a_kill_of_redis_while_idle_loses_nothing(start: Start, redis: Client, data_dir: Path) -> None:
    first = await start()
    before = await changed(first)
    idle_since = time.monotonic()
    await until("everysec has passed", lambda: asyncio.sleep(0, time.monotonic() - idle_since > IDLE_S))
    pid = redis_pid(data_dir)
    os.kill(pid, signal.SIGKILL)
    await until("Redis is gone", lambda: asyncio.sleep(0, not is_running(pid)))
    away = await first.http.get(memory_path("t1"))
    assert away.status_code == 503
    assert int(away.headers["retry-after"]) >= 1
    assert (await first.http.get("/health/ready")).status_code == 503
    assert (await first.http.get("/health/live")).status_code == 200
    await first.end(signal.SIGTERM)

    second = await start()
    assert redis_pid(data_dir) != pid
    assert await all_memories(second.http) == before
    assert (await second.http.get(memory_path("t4"))).status_code == 404
    assert await loaded_versions(redis) == {lib.name: lib.version for lib in shipped_libraries()}
    raw = await redis.execute("FT.INFO", "redismem:idx:{alice}")
    info = dict(zip(raw[::2], raw[1::2], strict=True))
    assert int(info[b"num_docs"]) == len(before)
    assert int(info[b"hash_indexing_failures"]) == 0
    for mode in ("hybrid", "keyword"):
        assert await best_hits(second.http, ["number7", "corrected", "patched"], mode) == ["t7", "new", "t3"]
    assert await best_hits(second.http, ["Ana: corrected"], "semantic") == ["new"]


async def test_sigterm_embeds_what_was_accepted_and_stops_redis(start: Start, data_dir: Path) -> None:
    first = await start(embed_s=0.05)
    body = [{"memories": [{"text": f"memory {i} of part {part}"} for i in range(500)]} for part in range(3)]
    replies = await asyncio.gather(*(first.http.post(f"{USER}/memories?wait=false", json=b) for b in body))
    assert {reply.status_code for reply in replies} == {202}
    assert not all(memory["embedded"] for memory in (await all_memories(first.http)).values())
    pid = redis_pid(data_dir)
    await first.end(signal.SIGTERM)
    assert not is_running(pid)

    second = await start()
    memories = await all_memories(second.http)
    assert len(memories) == 1500
    assert all(memory["embedded"] for memory in memories.values())


async def test_a_request_that_runs_when_sigterm_comes_is_answered(start: Start) -> None:
    running = await start(embed_s=0.3)
    request = asyncio.create_task(running.http.post(f"{USER}/memories", json={"id": "m", "text": "last"}))

    async def accepted() -> bool:
        return request.done() or await asyncio.to_thread(has_connection, running)

    await until("the request has arrived", accepted)
    await running.end(signal.SIGTERM)
    assert (await request).status_code == 201
    again = await start()
    assert (await again.http.get(memory_path("m"))).status_code == 200


def has_connection(running: Running) -> bool:
    """Return whether the service's port has an established connection."""
    port = running.http.base_url.port
    assert port is not None
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.mark.parametrize("wait", ["true", "false"])
async def test_two_processes_are_one_service(start: Start, wait: str) -> None:
    one, other = await start(embed_s=0.01), await start(embed_s=0.01)
    for i in range(20):
        (here, there), path = (
            ((one.http, other.http) if i % 2 else (other.http, one.http)),
            memory_path(f"m{i}"),
        )
        body = {"id": f"m{i}", "text": f"zebra number{i}"}
        assert (await here.post(f"{USER}/memories?wait={wait}", json=body)).status_code in (201, 202)
        assert (await there.get(path)).status_code == 200
        assert f"m{i}" in await all_memories(there)
        assert await best_hits(there, [f"number{i}"], "keyword") == [f"m{i}"]
        patch = await there.patch(path, json={"text": f"zebra changed{i}"})
        assert (await here.get(path)).json() == patch.json()
        assert await best_hits(here, [f"number{i}", f"changed{i}"], "keyword") == [None, f"m{i}"]
        assert (await there.delete(path)).status_code == 200
        for http in (here, there):
            assert (await http.get(path)).status_code == 404
            assert f"m{i}" not in await all_memories(http)
            assert await best_hits(http, [f"changed{i}"], "hybrid") == [None]
    for running in (one, other):
        await running.end(signal.SIGTERM)  # drains both queues
    last = await start()
    assert await all_memories(last.http) == {}
    assert await best_hits(last.http, ["zebra"], "hybrid") == [None]


async def test_a_newer_library_serves_and_is_never_downgraded(start: Start, redis: Client) -> None:
    old = await start()
    newer = {library.name: library.version + 1 for library in shipped_libraries()}
    for library in shipped_libraries():
        marker = f"-- Version: {library.version}\n"
        assert marker in library.code
        code = library.code.replace(marker, f"-- Version: {library.version + 1}\n", 1)
        await redis.execute("FUNCTION", "LOAD", "REPLACE", code)
    await changed(old)
    young = await start()
    assert await loaded_versions(redis) == newer
    assert await best_hits(young.http, ["corrected"], "hybrid") == ["new"]
    assert (await young.http.delete(USER)).json()["memories"] == 200
    await changed(young)
    assert await loaded_versions(redis) == newer


async def test_lost_libraries_are_loaded_again_by_the_next_call(start: Start, redis: Client) -> None:
    running = await start()
    await redis.execute("FUNCTION", "FLUSH")
    assert len(await changed(running)) == 200
    assert await loaded_versions(redis) == {lib.name: lib.version for lib in shipped_libraries()}
