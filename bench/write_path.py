"""How fast do memories go in, and how long until a write is acknowledged while others read?

Bulk and single writes, with the bundled model and with an embedder that costs nothing; then single
writes at a fixed rate (open loop: a late write counts from when it was due) beside readers that never
pause.
Usage: python bench/write_path.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Connection, Server, percentiles, running_server, sentences, write_result

SEED = 11
BATCH = 200
BULK = 2_000
SINGLE = 300
WRITES_PER_S = 20
READERS = 8
QUERY_WORDS = (4, 8)
SECONDS = 20
WITHOUT_EMBEDDING = {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1"}


async def bulk(http: Connection, texts: list[str]) -> dict[str, float]:
    """Return memories per second, many a request."""
    started = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        batch = [{"text": text} for text in texts[first : first + BATCH]]
        status, body = await http.request("POST", "/v1/users/bulk/memories", {"memories": batch})
        assert status == 201, body
    return {"per_s": round(len(texts) / (time.perf_counter() - started), 1), "n": len(texts)}


async def single(http: Connection, texts: list[str], query: str) -> dict[str, float]:
    """Return memories per second and acknowledgement times, one a request, one connection."""
    times = []
    started = time.perf_counter()
    for text in texts:
        before = time.perf_counter()
        status, body = await http.request("POST", f"/v1/users/single/memories{query}", {"text": text})
        times.append((time.perf_counter() - before) * 1000)
        assert status in (201, 202), body
    return {"per_s": round(len(texts) / (time.perf_counter() - started), 1), **percentiles(times)}


async def under_load(server: Server, seconds: float) -> dict[str, Any]:
    """Return acknowledgement times of writes at a fixed rate while readers search without pause."""
    ends = time.perf_counter() + seconds
    reads: list[float] = []
    writes: list[float] = []

    async def reader(number: int) -> None:
        http = Connection(server.url)
        for text in sentences(20_000, SEED + number, QUERY_WORDS):
            if time.perf_counter() > ends:
                break
            before = time.perf_counter()
            status, body = await http.request("POST", "/v1/users/bulk/search", {"text": text})
            reads.append((time.perf_counter() - before) * 1000)
            assert status == 200, body
        http.close()

    async def write(http: Connection, text: str, due: float) -> None:
        status, body = await http.request("POST", "/v1/users/bulk/memories", {"text": text})
        writes.append((time.perf_counter() - due) * 1000)
        assert status == 201, body

    async def writer() -> None:
        # one connection a write in flight, so that a slow one delays no other
        free: list[Connection] = []
        running: set[asyncio.Task[None]] = set()

        async def one(text: str, due: float) -> None:
            http = free.pop() if free else Connection(server.url)
            await write(http, text, due)
            free.append(http)

        due = time.perf_counter()
        for number in range(int(seconds * WRITES_PER_S)):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            running.add(asyncio.create_task(one(f"written under load {number}", due)))
            due += 1 / WRITES_PER_S
        await asyncio.gather(*running)
        for http in free:
            http.close()

    await asyncio.gather(writer(), *(reader(number) for number in range(READERS)))
    return {
        "acknowledged": percentiles(writes),
        "search": percentiles(reads),
        "searches_per_s": round(len(reads) / seconds, 1),
    }


async def run(server: Server, *, embedding: bool, quick: bool) -> dict[str, Any]:
    """Return all figures of one server."""
    http = Connection(server.url)
    share = 5 if quick else 1
    texts = sentences(BULK // share, SEED)
    figures: dict[str, Any] = {"bulk": await bulk(http, texts)}
    singles = sentences(SINGLE // share, SEED + 1)
    figures["single"] = await single(http, singles, "")
    if embedding:
        figures["single wait=false"] = await single(http, sentences(SINGLE // share, SEED + 2), "?wait=false")
        figures["under load"] = await under_load(server, SECONDS / share)
    http.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of everything")
    arguments = parser.parse_args()
    with running_server() as server:
        figures = {"with embedding": asyncio.run(run(server, embedding=True, quick=arguments.quick))}
        info = server.redis_info
    with running_server(**WITHOUT_EMBEDDING) as server:
        figures["without embedding"] = asyncio.run(run(server, embedding=False, quick=arguments.quick))
    print(json.dumps(figures, indent=1))
    print(write_result("write_path", {"redis": info, "figures": figures}))


if __name__ == "__main__":
    main()
