"""What does a cold search cost over HTTP, and how much of it is ours?

Every query is new, so nothing is cached. The floor is measured in the same run, turn by turn with the
searches: one embedding plus one raw FT.SEARCH (KNN 10), called directly; and an empty Starlette endpoint.
Usage: python bench/read_path.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from redis.asyncio import Redis

sys.path.insert(0, str(Path(__file__).parent))
from harness import Connection, Server, free_port, percentiles, running_server, sentences, write_result

from redismem.embed import Embedder, open_embedder
from redismem.settings import Settings

SEED = 7
SIZES = (1_000, 10_000)
USERS = 1_000
MEMORIES_PER_USER = 20
QUERIES = 400
QUERY_WORDS = (4, 8)
WARM_UP = 50
BATCH = 200

EMPTY_APP = """
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
async def empty(request):
    return Response(b"{}", media_type="application/json")
uvicorn.run(Starlette(routes=[Route("/", empty, methods=["POST"])]), port=%d, log_level="warning")
"""


async def load(http: Connection, user: str, texts: list[str]) -> None:
    """Store texts as memories of one user."""
    for first in range(0, len(texts), BATCH):
        batch = [{"text": text} for text in texts[first : first + BATCH]]
        status, body = await http.request("POST", f"/v1/users/{user}/memories", {"memories": batch})
        assert status == 201, body


async def floor(redis: Redis, embedder: Embedder, user: str, text: str) -> tuple[float, float]:
    """Return milliseconds of one embedding and of one raw FT.SEARCH."""
    started = time.perf_counter()
    vector = (await embedder.embed([text]))[0]
    embedded = time.perf_counter()
    await redis.execute_command(
        *("FT.SEARCH", f"redismem:idx:{{{user}}}", "*=>[KNN 10 @embedding $v AS d]"),
        *("PARAMS", 2, "v", vector.astype(np.float16).tobytes(), "RETURN", 2, "d", "text"),
        *("SORTBY", "d", "LIMIT", 0, 10, "DIALECT", 2),
    )
    return (embedded - started) * 1000, (time.perf_counter() - embedded) * 1000


async def measure(server: Server, empty: Connection, users: list[str], mode: str) -> dict[str, Any]:
    """Return percentiles of a cold search, its parts, and the floor."""
    http, redis = Connection(server.url), Redis.from_url(server.redis_url + "?protocol=2")
    embedder = await open_embedder(Settings())
    # its own for each measurement: a text whose vector is cached is not embedded
    texts = sentences(WARM_UP + QUERIES, crc32(f"{users[0]} {mode}".encode()), QUERY_WORDS)
    figures: dict[str, list[float]] = {name: [] for name in ("search", "embed", "redis", "floor", "empty")}
    floors: dict[str, list[float]] = {"embedding": [], "ft_search": []}
    for number, text in enumerate(texts):
        user = users[number % len(users)]
        body = {"text": "what of " + text, "search_mode": mode}
        started = time.perf_counter()
        status, raw = await http.request("POST", f"/v1/users/{user}/search", body)
        took = (time.perf_counter() - started) * 1000
        assert status == 200, raw
        embedding, ft_search = await floor(redis, embedder, user, "and what of " + text)
        started = time.perf_counter()
        await empty.request("POST", "/", body)
        nothing = (time.perf_counter() - started) * 1000
        if number >= WARM_UP:
            timing = json.loads(raw)["timing"]
            lowest = ft_search if mode == "keyword" else embedding + ft_search
            values = (took, timing["embed"], timing["search"], lowest, nothing)
            for name, value in zip(figures, values, strict=True):
                figures[name].append(value)
            floors["embedding"].append(embedding)
            floors["ft_search"].append(ft_search)
    await embedder.close()
    await redis.aclose()
    http.close()
    result: dict[str, Any] = {name: percentiles(values) for name, values in (figures | floors).items()}
    result["over_floor_p50_ms"] = round(result["search"]["p50"] - result["floor"]["p50"], 3)
    return result


async def run(server: Server, empty_url: str, *, quick: bool) -> dict[str, Any]:
    """Load the users and measure each size."""
    http, empty = Connection(server.url), Connection(empty_url)
    figures = {}
    for size in SIZES[:1] if quick else SIZES:
        await load(http, f"user{size}", sentences(size, SEED))
        for mode in ("hybrid", "semantic", "keyword"):
            figures[f"1 user x {size} {mode}"] = await measure(server, empty, [f"user{size}"], mode)
    if not quick:
        users = [f"small{number}" for number in range(USERS)]
        for number, user in enumerate(users):
            await load(http, user, sentences(MEMORIES_PER_USER, number))
        figures[f"{USERS} users x {MEMORIES_PER_USER} hybrid"] = await measure(server, empty, users, "hybrid")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 memories only")
    arguments = parser.parse_args()
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", EMPTY_APP % port]) as empty:
        try:
            with running_server() as server:
                figures = asyncio.run(run(server, f"http://127.0.0.1:{port}", quick=arguments.quick))
        finally:
            empty.terminate()
    columns = ("search", "floor", "embedding", "ft_search", "empty", "embed", "redis")
    print(f"{'p50 / p95 / p99 ms':28}" + "".join(f"{name:>22}" for name in columns))
    for name, row in figures.items():
        cells = (f"{row[c]['p50']:.2f} / {row[c]['p95']:.2f} / {row[c]['p99']:.2f}" for c in columns)
        print(f"{name:28}" + "".join(f"{cell:>22}" for cell in cells) + f"  +{row['over_floor_p50_ms']:.2f}")
    print(write_result("read_path", {"redis": server.redis_info, "figures": figures}))


if __name__ == "__main__":
    main()
