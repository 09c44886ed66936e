"""How long until a killed server serves again, and what does a large user's graph add to that?

Stores in the embedded server, append-only file on: nothing (the floor); many users of ordinary size; these
and a large user with a finished graph; instead those vectors in RediSearch's own HNSW, to compare. Each is
killed with SIGKILL. Measured is the time until the server has loaded all that it held (which is checked), and
anew, until `redismem serve` on that directory answers /health/ready with 200, and its first searches.
Usage: python bench/recovery.py [--quick] [--large N]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

sys.path.insert(0, str(Path(__file__).parent))
from harness import free_port, percentiles, sentences, write_result

from redismem.client import Client
from redismem.codec import derived_id, memory_fields, unit, vector_bytes
from redismem.embed import Embedder, Vectors, open_embedder
from redismem.embedded import EmbeddedRedis
from redismem.graph import Graphs
from redismem.index import Indexes
from redismem.keys import Owner
from redismem.l1 import L1
from redismem.lualib import Functions, load_libraries
from redismem.queryvectors import QueryVectors
from redismem.read import Reader
from redismem.settings import Settings
from redismem.store import claim
from redismem.types import MemoryInput, SearchRequest

SEED = 5
USERS, QUICK_USERS, MEMORIES = 1_000, 100, 100
LARGE, QUICK_LARGE = 20_000, 2_000
RUNS = 3
BAR_S = 10
POLL_S, PATIENCE_S = 0.01, 900
PIPELINE = 200
#: hits of a search; searches that are not counted
K, WARM_UP = 10, 40

#: M and EF_CONSTRUCTION of RediSearch's own HNSW: those of the profile `production`
SEARCH_LINKS, SEARCH_WIDTH = 32, 200

#: clusters: sizes fall as 1/rank; noise as long as a centre, its deviation falling as 1/sqrt(i) over the
#: dimensions. That gives a local intrinsic dimension (maximum likelihood, 20 neighbours) of 27; that of real
#: questions among real turns is 23, with white noise it would be 70
CENTRES, NOISE, DECAY = 200, 1.0, 0.5

Command = Sequence[Any]


def clustered(count: int, dim: int) -> Vectors:
    """Return unit vectors in Gaussian clusters with sizes by a power law."""
    chooser = np.random.default_rng((SEED, count, dim))
    centres = unit(chooser.standard_normal((CENTRES, dim)))
    sizes = 1 / np.arange(1, CENTRES + 1)
    spread = np.arange(1.0, dim + 1) ** -DECAY
    spread *= NOISE / np.linalg.norm(spread)
    noise = chooser.standard_normal((count, dim), np.float32) * spread.astype(np.float32)
    return unit(centres[chooser.choice(CENTRES, count, p=sizes / sizes.sum())] + noise)


class Store:
    """A server with memories: `redis` for raw commands, `functions` for the product's."""

    def __init__(self, server: EmbeddedRedis, embedder: Embedder) -> None:
        self.url = server.url
        self.embedder = embedder
        self.redis = Redis.from_url(self.url + "&protocol=2")
        self.functions = Functions(Client(Settings(redis_timeout_s=60), self.url))
        self._server = server

    def load(self, owner: Owner, vectors: Vectors) -> dict[str, float]:
        """Store vectors as memories with texts, a second apart; return what it cost.

        Returns:
            s: seconds from start to end; redis_s: those that Redis spent on HSET; bytes: of Redis's memory.
        """
        texts, memory, redis_s = sentences(len(vectors), SEED), self.used_bytes, self.redis_s("hset")
        started_s = time.time()
        for first in range(0, len(vectors), PIPELINE):
            pipeline = self.redis.pipeline(transaction=False)
            for i in range(first, min(first + PIPELINE, len(vectors))):
                now_s = started_s - len(vectors) + i
                fields = memory_fields(MemoryInput(text=texts[i]), now_s)
                memory_id = derived_id(str(fields["content_hash"]), i)
                more = {"pk": memory_id, "created_at": now_s, "updated_at": now_s, "version": 1}
                vector = {"embedder": self.embedder.name, "embedding": vector_bytes(vectors[i])}
                pipeline.hset(owner.memory(memory_id), mapping={**fields, **more, **vector})
                pipeline.zadd(owner.ids, {memory_id: now_s})
            pipeline.execute()
        took_s, redis_s = time.time() - started_s, self.redis_s("hset") - redis_s
        self.redis.hset(owner.meta, "last_activity", repr(started_s))
        self.settle()
        return {"s": took_s, "redis_s": redis_s, "bytes": self.used_bytes - memory}

    async def load_indexed(self, owner: Owner, vectors: Vectors) -> dict[str, float]:
        """Make the exact index, then store as `load` does."""
        assert await Indexes(self.functions, self.embedder).open(owner)
        return self.load(owner, vectors)

    def load_hnsw(self, owner: Owner, vectors: Vectors) -> dict[str, float]:
        """Make RediSearch's own HNSW index `hnsw`, of the vectors alone, then store as `load` does."""
        built = ("M", SEARCH_LINKS, "EF_CONSTRUCTION", SEARCH_WIDTH)
        vector = ("TYPE", "FLOAT16", "DIM", vectors.shape[1], "DISTANCE_METRIC", "COSINE", *built)
        self.redis.execute_command(
            *("FT.CREATE", "hnsw", "ON", "HASH", "PREFIX", 1, owner.memory_prefix),
            *("SCHEMA", "embedding", "VECTOR", "HNSW", len(vector), *vector),
        )
        cost = self.load(owner, vectors)
        self.redis.delete(owner.meta, owner.ids)  # the product must not take it for a user of its own
        return cost

    def redis_s(self, command: str) -> float:
        """Return the seconds that Redis has spent on a command."""
        stats = self.redis.info("commandstats").get(f"cmdstat_{command}")
        return stats["usec"] / 1e6 if stats else 0.0

    @property
    def used_bytes(self) -> int:
        """Return what Redis holds, without the tables that its Lua grows once, whatever the size."""
        memory = self.redis.info("memory")
        return int(memory["used_memory"] - memory["used_memory_vm_total"])

    @property
    def versions(self) -> dict[str, str]:
        info = self.redis.info("everything")
        return {name: info[name] for name in ("redis_version", "search_version")}

    def settle(self) -> None:
        """Return when Redis does nothing by itself: no rewrite of the file, no memory to be freed."""
        while (
            self.redis.info("persistence")["aof_rewrite_in_progress"]
            or self.redis.info("memory")["lazyfree_pending_objects"]
        ):
            time.sleep(POLL_S)

    def kill(self) -> None:
        """Kill the server, as an out-of-memory killer would."""
        assert self._server.pid
        os.kill(self._server.pid, signal.SIGKILL)


@asynccontextmanager
async def opened(embedder: Embedder, data_dir: Path | None = None) -> AsyncIterator[Store]:
    """Start a server with our Functions, in a directory of its own if it is given none."""
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        async with EmbeddedRedis(data_dir or Path(folder) / "data") as redis:
            store = Store(redis, embedder)
            try:
                await load_libraries(store.functions.client)
                yield store
            finally:
                await store.functions.client.close()
                store.redis.close()


class _Recorder(Functions):
    """Keeps the commands that it is given, and sends none."""

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        self.sent = list(commands)
        return [[b"OK", b"0", 0, b""]] * len(commands)


async def searches(store: Store, owner: Owner, vectors: Vectors, ef: int | None = None) -> list[Command]:
    """Return the commands that the product sends for semantic searches: calls of rm_search_ro_v1."""
    recorder = _Recorder(store.functions.client)
    settings = Settings(l2_searches=0)  # else it asks for a cached one, and keeps what it finds
    vectors = QueryVectors(store.embedder, L1(max_entries=0, max_bytes=1024), ttl_s=settings.embedding_ttl_s)
    reader = Reader(recorder, store.embedder, vectors, settings)
    requests = [SearchRequest(vector=v.tolist(), search_mode="semantic", limit=K, ef=ef) for v in vectors]
    await reader.search_each(owner, requests[:1])  # a process learns who has a graph
    recorder.sent.clear()
    await reader.search_each(owner, requests)
    return recorder.sent


def timed(redis: Redis, commands: Sequence[Command]) -> tuple[list[Any], dict[str, float]]:
    """Send commands one after the other; return replies and milliseconds of those after the warm-up."""
    replies, times_ms = [], []
    for command in commands:
        started = time.perf_counter()
        replies.append(redis.execute_command(*command))
        times_ms.append((time.perf_counter() - started) * 1000)
    kept_ms = times_ms[WARM_UP:]
    return replies[WARM_UP:], {**percentiles(kept_ms), "per_s": round(1000 * len(kept_ms) / sum(kept_ms), 1)}


def contents(url: str) -> dict[str, int]:
    """Return how many keys, indexed memories and vectors of graphs a server holds."""
    with Redis.from_url(url + "&protocol=2") as redis:
        names = redis.execute_command("FT._LIST")
        pipeline = redis.pipeline(transaction=False)
        for name in names:
            pipeline.execute_command("FT.SEARCH", name, "*", "LIMIT", 0, 0, "DIALECT", 2)
        indexed = sum(reply[0] for reply in pipeline.execute())
        graphs = sum(redis.execute_command("VCARD", graph) or 0 for graph in Owner("large").graphs)
        return {"keys": redis.dbsize(), "indexes": len(names), "indexed": indexed, "graph": graphs}


async def restarted(data_dir: Path, before: dict[str, int]) -> float:
    """Start the server of a directory, kill it again; return the seconds until it was ready."""
    started = time.perf_counter()
    async with EmbeddedRedis(data_dir) as redis:
        took_s = time.perf_counter() - started
        assert contents(redis.url) == before, (contents(redis.url), before)
        assert redis.pid
        os.kill(redis.pid, signal.SIGKILL)
    return took_s


def answered(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Return status and body of a request on a new connection; 0 while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        content = json.dumps(body) if body else None
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def served(data_dir: Path, log: Path, users: Sequence[str]) -> tuple[float, list[float]]:
    """Run `redismem serve` on a directory until it is ready, and kill it with its Redis.

    Returns:
        Seconds until it was ready, then milliseconds of the first search of each of the users.
    """
    port = free_port()
    command = [sys.executable, "-m", "redismem", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while answered(port, "GET", "/health/ready")[0] != 200:
                if process.poll() is not None or time.perf_counter() - started > PATIENCE_S:
                    raise SystemExit(f"redismem serve did not get ready:\n{log.read_text()}")
                time.sleep(POLL_S)
            ready_s, first_ms = time.perf_counter() - started, []
            for user in users:
                asked = time.perf_counter()
                status, body = answered(port, "POST", f"/v1/users/{user}/search", {"text": "who knows"})
                first_ms.append(round((time.perf_counter() - asked) * 1000, 1))
                assert status == 200, body
                assert not json.loads(body)["partial"], body
            with Redis.from_url(f"unix://{data_dir / 'redis.sock'}") as redis:
                os.kill(int(redis.info("server")["process_id"]), signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    return ready_s, first_ms


async def measure(embedder: Embedder, users: int, large: str | None, size: int) -> dict[str, Any]:
    """Return the times of one store.

    Args:
        large: what the large user has: graph, hnsw, or None for no such user.
        size: the large user's memories.
    """
    runs = 1 if large == "hnsw" else RUNS
    vectors = clustered(users * MEMORIES, embedder.dim)
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        data_dir = Path(folder) / "data"
        async with opened(embedder, data_dir) as store:
            await claim(store.functions.client, embedder)
            for number in range(users):
                mine = vectors[number * MEMORIES : (number + 1) * MEMORIES]
                await store.load_indexed(Owner(f"user{number}"), mine)
            started = time.perf_counter()
            if large == "graph":
                await store.load_indexed(Owner("large"), clustered(size, embedder.dim))
                assert await Graphs(store.functions).build(Owner("large"), "production")
            elif large == "hnsw":
                store.load_hnsw(Owner("large"), clustered(size, embedder.dim))
            loaded_s = time.perf_counter() - started
            before, memory, versions = contents(store.url), store.used_bytes, store.versions
            store.kill()
        on_disk = sum(path.stat().st_size for path in data_dir.rglob("*.aof"))
        on_disk += sum(path.stat().st_size for path in data_dir.rglob("*.rdb"))
        ready_s = [await restarted(data_dir, before) for _ in range(runs)]
        asked = [*["user0", f"user{users - 1}"][:users], *["large"] * (large == "graph")]
        serving = [served(data_dir, Path(folder) / "serve.log", asked) for _ in range(runs)]
    return {
        "redis": versions,
        **before,
        "used_mb": round(memory / 1e6),
        "aof_mb": round(on_disk / 1e6),
        "large_loaded_s": round(loaded_s, 1),
        "redis_ready_s": [round(seconds, 2) for seconds in ready_s],
        "serve_ready_s": [round(seconds, 2) for seconds, _ in serving],
        "first_search_ms": [first_ms for _, first_ms in serving],
    }


async def run(users: int, size: int) -> dict[str, Any]:
    """Measure every store."""
    embedder = await open_embedder(Settings())  # the one of `redismem serve`, which refuses others
    stores = [
        ("nothing", 0, None),
        (f"{users:,} users x {MEMORIES}", users, None),
        (f"and one of {size:,} with a graph", users, "graph"),
        (f"or one of {size:,} in RediSearch HNSW", users, "hnsw"),
    ]
    figures = {}
    print(f"{'killed with SIGKILL':44}{'memories':>9}{'AOF MB':>8}  {'Redis ready s':22}{'serve ready s':22}")
    for name, count, large in stores:
        row = figures[name] = await measure(embedder, count, large, size)
        shown = (" ".join(map(str, row[what])) for what in ("redis_ready_s", "serve_ready_s"))
        cells = "".join(f"{cell:22}" for cell in shown)
        print(f"{name:44}{row['indexed']:9,}{row['aof_mb']:8}  {cells}", flush=True)
    await embedder.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_USERS} users, a large one of {QUICK_LARGE:,}"
    )
    parser.add_argument("--large", type=int, help=f"memories of the large user; {LARGE:,} by default")
    arguments = parser.parse_args()
    users = QUICK_USERS if arguments.quick else USERS
    size = arguments.large or (QUICK_LARGE if arguments.quick else LARGE)
    figures = asyncio.run(run(users, size))
    print(f"bar: serving again in under {BAR_S} s")
    is_whole = not arguments.quick and size == LARGE
    print(write_result("recovery" if is_whole else "recovery-part", {"bar_s": BAR_S, "figures": figures}))


if __name__ == "__main__":
    main()
