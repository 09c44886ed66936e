"""Promotion in a running service: killed anywhere it goes on, and nobody sees half a graph."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import httpx
import pytest

from redismem.client import Client
from redismem.errors import RedisUnavailable
from redismem.graph import Graph
from redismem.keys import Owner
from tests.accept.conftest import USER, Running, Start, best_hits, redis_pid
from tests.conftest import until

pytestmark = pytest.mark.accept

COUNT = 600
OWNER = Owner("alice")
#: vectors in the graph when something is killed; the build of all takes about a second
MOMENTS = (1, 300, 599)
LARGE = {"hnsw_threshold": 200, "maintain_every_s": 0.2}


async def stored(http: httpx.AsyncClient) -> dict[str, str]:
    texts = {f"m{i}": f"zebra unique{i} word{i % 7}" for i in range(COUNT)}
    items = [{"id": memory_id, "text": text} for memory_id, text in texts.items()]
    for first in range(0, COUNT, 200):
        reply = await http.post(f"{USER}/memories", json={"memories": items[first : first + 200]})
        assert reply.status_code == 201, reply.text
    return texts


async def has_graph(redis: Client) -> bool:
    with suppress(RedisUnavailable):  # it was just started
        return await redis.execute("HGET", OWNER.meta, "graph") is not None
    return False


async def reached(redis: Client, count: int) -> bool:
    """Tell whether the graph, being built or done, has that many vectors."""
    with suppress(RedisUnavailable):
        raw = await redis.execute("HMGET", OWNER.meta, "graph", "graph_next")
        graph = Graph.parsed(raw[0] or raw[1])
        return graph is not None and await redis.execute("VCARD", OWNER.graphs[graph.number]) >= count
    return False


async def check(running: Running, redis: Client, texts: dict[str, str]) -> None:
    """Check that the graph holds every memory once, and that searches find each."""
    raw = await redis.execute("HGET", OWNER.meta, "graph")
    graph = Graph.parsed(raw)
    assert graph is not None
    key = OWNER.graphs[graph.number]
    there = await redis.pipeline([("VISMEMBER", key, memory_id) for memory_id in texts])
    assert all(there)
    assert await redis.execute("VCARD", key) == len(texts)
    assert await redis.execute("EXISTS", OWNER.graphs[1 - graph.number]) == 0
    assert await best_hits(running.http, list(texts.values()), "semantic") == list(texts)


@pytest.mark.parametrize("victim", ["service", "redis"])
async def test_a_promotion_killed_at_any_point_is_done_in_the_end(
    start: Start, redis: Client, victim: str
) -> None:
    running = await start()  # its threshold is out of reach
    texts = await stored(running.http)
    await running.end(signal.SIGTERM)
    for moment in MOMENTS:
        running = await start(**LARGE)

        async def is_reached(count: int = moment) -> bool:
            return await reached(redis, count)

        await until(f"{moment} vectors are in the graph", is_reached, 30)
        if victim == "redis":
            os.kill(redis_pid(running.data_dir), signal.SIGKILL)
        await running.end(signal.SIGKILL)
    running = await start(**LARGE)
    await until("the graph serves", lambda: has_graph(redis), 30)
    await check(running, redis, texts)


async def test_searches_and_writes_go_on_while_a_graph_is_built(start: Start, redis: Client) -> None:
    running = await start()
    texts = await stored(running.http)
    await running.end(signal.SIGTERM)
    running = await start(**LARGE)
    plans: list[str] = []
    number = 0
    while not await has_graph(redis):
        number += 1
        added, gone = f"new{number}", f"m{number}"
        await running.http.post(f"{USER}/memories", json={"id": added, "text": f"fresh{number} thing"})
        await running.http.delete(f"{USER}/memories/{gone}")
        texts.pop(gone, None)
        texts[added] = f"fresh{number} thing"
        body = {"text": texts[added], "search_mode": "semantic", "explain": True, "limit": 100}
        reply = (await running.http.post(f"{USER}/search", json=body)).json()
        plans.append(reply["plan"]["index"])
        assert reply["memories"][0]["id"] == added
        assert gone not in {hit["id"] for hit in reply["memories"]}
        assert (reply["total"], reply["partial"]) == (COUNT, False)
    assert number > 3
    assert plans[0] == "flat"
    await check(running, redis, texts)


async def test_the_log_of_redis_is_rewritten_so_that_a_restart_loads_graphs_as_graphs(
    start: Start, redis: Client
) -> None:
    running = await start()
    await stored(running.http)
    await running.end(signal.SIGTERM)
    running = await start(**LARGE)
    await until("the graph serves", lambda: has_graph(redis), 30)
    assert await redis.execute("HGET", OWNER.meta, "graph_writes") == b"0"

    async def log_bytes() -> int:
        await asyncio.sleep(0)
        folder = running.data_dir / "appendonlydir"
        return sum(path.read_bytes().count(b"VADD") for path in folder.glob("*.incr.aof"))

    assert await log_bytes() == 0
    os.kill(redis_pid(running.data_dir), signal.SIGKILL)
    await running.end(signal.SIGKILL)
    running = await start(**LARGE)
    await until("the graph is there at once", lambda: reached(redis, COUNT), 2)
