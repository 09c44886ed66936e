"""The store that bench/worker.py measures on: its users, the services that run on it, the jobs they get.

What is measured on it is in workerjobs.py and workerreads.py.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import Server
from index import GROWN_NOISE, GROWN_SHARE
from recovery import Store

from redismem.codec import unit
from redismem.embed import Embedder, Vectors
from redismem.jobs import REST
from redismem.keys import JOBS, JOBS_DEAD, JOBS_LATER, JOBS_LIVE, JOBS_REST, JOBS_TRIES, Owner
from redismem.service import Service
from redismem.types import ImportRecord

Figures = dict[str, Any]

SEED = 31
#: memories of a grown user
SIZES = (100, 1_000, 10_000, 50_000)
#: characters of a grown text; days over which a grown user wrote
TEXT_CHARS, DAYS = 400, 365
#: summaries made one after the other, of the largest topics; no user has so many topics
SUMMARIES, MOST_TOPICS = 10, 5_000
PATIENCE_S, POLL_S = 60.0, 0.001
#: nothing that is done by the clock may mix with what is measured
SERVER = {"REDISMEM_MAINTAIN_EVERY_S": "0", "REDISMEM_OVERLOAD_MS": "0", "REDISMEM_HNSW_THRESHOLD": "1000000"}
NEVER = 9 * 10**13


@dataclass(frozen=True)
class Talk:
    """A conversation: memories as the API takes them, and their vectors."""

    name: str
    memories: list[Figures]
    vectors: Vectors


class Ready:
    """An embedder that knows its texts; a turn's context adds nothing, its vector holds it already."""

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.dim, self.count_tokens = embedder.name, embedder.dim, embedder.count_tokens
        self.known: dict[str, Any] = {}
        self._none = np.zeros(embedder.dim, np.float32)

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        del urgent
        return np.array([self.known.get(text, self._none) for text in texts])

    async def close(self) -> None:
        """Nothing is open."""


def grown(talks: Sequence[Talk], size: int, seed: int = SEED) -> tuple[list[Figures], Vectors]:
    """Return memories of one user, and their vectors: mixtures of two turns of a conversation plus noise."""
    chooser = np.random.default_rng((seed, size))
    lengths = np.array([len(talk.memories) for talk in talks])
    which = chooser.choice(len(talks), size, p=lengths / lengths.sum())
    places = (chooser.random((2, size)) * lengths[which]).astype(int)
    share = chooser.uniform(GROWN_SHARE, 1, (size, 1)).astype(np.float32)
    one, other = (np.array([talks[t].vectors[i] for t, i in zip(which, row, strict=True)]) for row in places)
    noise = chooser.standard_normal(one.shape, np.float32) * (GROWN_NOISE / one.shape[1] ** 0.5)
    memories, now_s = [], time.time()
    for number, (talk, i, j) in enumerate(zip(which, *places, strict=True)):
        first, second = (talks[talk].memories[place] for place in (i, j))
        moment = datetime.fromtimestamp(now_s - DAYS * 86_400 * (1 - (number + 1) / size), UTC).isoformat()
        memories.append(
            {
                "id": f"m{number}",
                "text": f"{first['text']} {second['text']}"[:TEXT_CHARS],
                "memory_type": "message",
                "entities": [first["text"].partition(":")[0]],
                "event_date": moment,
                "created_at": moment,
            }
        )
    return memories, unit(share * one + (1 - share) * other + noise)


class Bench:
    """A store, what is put into it, and the conversations it comes from."""

    def __init__(self, store: Store, service: Service, ready: Ready, talks: Sequence[Talk]) -> None:
        self.store, self.service, self.talks = store, service, talks
        self.redis = store.redis
        self._ready = ready

    async def put(self, owner: Owner, memories: list[Figures], vectors: Vectors) -> float:
        """Store memories as the service does, with ready vectors; return the seconds it took."""
        self._ready.known = {memory["text"]: vector for memory, vector in zip(memories, vectors, strict=True)}
        started = time.perf_counter()
        reply = await self.service.writer.put(owner, msgspec.convert(memories, list[ImportRecord]))
        took_s = time.perf_counter() - started
        assert all(item.outcome == "CREATED" and item.embedded for item in reply.memories), reply.memories[0]
        return took_s

    async def put_grown(self, size: int) -> Owner:
        """Return the grown user of that size, stored now if it was not."""
        owner = Owner(f"grown{size}")
        if not self.redis.exists(owner.meta):
            await self.put(owner, *grown(self.talks, size))
        return owner

    def clear(self) -> None:
        """Take out all jobs, those that a service left included; none runs now."""
        self.store.settle()
        self.redis.delete(JOBS, JOBS_LIVE, JOBS_LATER, JOBS_REST, JOBS_TRIES)

    def hold_summaries(self, owner: Owner) -> None:
        """Let the summaries that clustering queues wait until they are queued by name."""
        names = (owner.job(f"summary:topic:{number}") for number in range(1, MOST_TOPICS))
        self.redis.zadd(JOBS_REST, dict.fromkeys(names, NEVER))

    def due(self) -> int:
        """Return how many jobs may start."""
        return int(self.redis.zcount(JOBS_LATER, 0, int(time.time() * 1000)))

    @asynccontextmanager
    async def serving(self, *, worker: bool, **environment: str) -> AsyncIterator[Server]:
        """Run `redismem serve` on the store; nothing waits when it starts."""
        url = {"REDISMEM_REDIS_URL": self.store.url, "REDISMEM_WORKER": str(int(worker))}
        with harness.running_server(**SERVER, **url, **environment) as server:
            yield server

    def queue(self, owner: Owner, *kinds: str) -> None:
        """Queue jobs to be done now, even those that rest."""
        names = [owner.job(kind) for kind in kinds]
        self.redis.zrem(JOBS_REST, *names)
        self.redis.zadd(JOBS_LATER, dict.fromkeys(names, int(time.time() * 1000)))

    async def done(self, owner: Owner, kind: str, within_s: float = PATIENCE_S) -> float | None:
        """Queue one job and return the seconds that it took; None if it was not done in time."""
        name, deadline = owner.job(kind), time.monotonic() + within_s
        self.queue(owner, kind)
        # a job that is done rests for REST times as long as it took
        while (rests_until_ms := self.redis.zscore(JOBS_REST, name)) is None:
            if time.monotonic() > deadline or self.redis.hexists(JOBS_DEAD, name):
                return None
            await asyncio.sleep(POLL_S)
        return max(0.0, rests_until_ms / 1000 - time.time()) / REST

    async def idle(self, within_s: float = PATIENCE_S) -> bool:
        """Wait until no job is due or being done; return whether that came."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if not self.due() and not self.redis.xlen(JOBS):
                return True
            await asyncio.sleep(10 * POLL_S)
        return False


def jobs_done(bench: Bench) -> int:
    """Return how many jobs have left the stream."""
    if not bench.redis.exists(JOBS):
        return 0
    told = bench.redis.xinfo_stream(JOBS)
    return int(told["entries-added"]) - int(told["length"])


def cpu_ms(server: Server) -> Counter[str]:
    """Return the CPU milliseconds of service with worker, of Redis and of this process, and the `time`."""
    used = harness.cpu_ms(server)
    used["service"] += used["redis"]  # which this service did not start
    return used
