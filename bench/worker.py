"""What does the worker make of memories, what does that cost, and who has to wait for it?

One embedded Redis; the worker is that of `redismem serve`, which is given jobs through the queue. How long a
job took is read from the rest it gets for that. `grown` users hold mixtures of two turns of one conversation.
Parts: conversations (labels, summaries, profiles of FOLDER), sizes (time and memory by size), drain (jobs a
second when everybody has everything pending), reads (open loop, with the worker idle and busy, in turn),
profile (reads beside an empty endpoint), topics (searches of the nearest topics only). Labels are kept as a
result, texts are only printed. Needs `pip install -e '.[bench]'`.
Usage: python bench/worker.py FOLDER [--quick] [--only PART …]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from redis import Redis

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import Connection, Server, Tally, closed_loop, percentiles, request_bytes, sentences
from index import GROWN_NOISE, GROWN_SHARE, conversations
from recall import turns
from recovery import Store, opened

from redismem.codec import unit
from redismem.embed import Embedder, Vectors, open_embedder
from redismem.jobs import REST
from redismem.keys import JOBS, JOBS_DEAD, JOBS_LATER, JOBS_LIVE, JOBS_REST, JOBS_TRIES, STORE, Owner
from redismem.periods import SHAPES, names_of
from redismem.service import Service, assembled
from redismem.settings import Settings
from redismem.similarity import SIMILAR, nearest
from redismem.store import claim
from redismem.types import ImportRecord, SearchRequest
from redismem.views import BUDGETS

Figures = dict[str, Any]

PARTS = ("conversations", "sizes", "drain", "reads", "profile", "topics")
SEED = 31
SIZES = (100, 1_000, 10_000, 50_000)
DRAINED_USERS, DRAINED_MEMORIES, DRAIN_S = 200, 20, 90.0
READERS, READERS_MEMORIES = 100, 100
BUSY_MEMORIES = 10_000
#: open loops: searches a second
RATES_PER_S = {"hybrid": 40, "keyword and vector": 200}
ROUNDS, PHASE_S, SETTLE_S = 3, 4.0, 1.0
#: what keeps the worker busy; so many memories are new when it links
WORK = {
    "link": ("link",),
    "topics": ("topics",),
    "summaries": ("summary",),
    "everything": ("link", "topics", "profile", "summary"),
}
LINKED = 1_000
PROFILE_MEMORIES, PROFILE_BLOCKS, PROFILE_BLOCK_S = 1_000, 5, 1.5
NEAREST: tuple[int | None, ...] = (None, 20, 10, 5, 3, 1)
QUERIES, WARM_UP = 200, 20
#: characters of a grown text; days over which a grown user wrote
TEXT_CHARS, DAYS = 400, 365
PATIENCE_S = 60.0
#: summaries made one after the other; memories whose edges are looked at; no user has so many topics
SUMMARIES, SAMPLE, MOST_TOPICS = 10, 500, 5_000
#: of each kind, the last ones of a conversation are summarised
PERIODS = 6
POLL_S = 0.001
#: nothing that is done by the clock may mix with what is measured
SERVER = {"REDISMEM_MAINTAIN_EVERY_S": "0", "REDISMEM_HNSW_THRESHOLD": "1000000"}
NEVER = 9 * 10**13
SHOWN = 3
#: of a profile, what tells nothing of the user
ABOUT = {"user_id", "compiled_at", "valid_until", "patched", "generation", "context_summary"}


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


def processes(server: Server) -> dict[str, int]:
    """Return process ids: of the service, and of its worker if there is one."""
    found = {"service": server.pid}
    for path in Path(f"/proc/{server.pid}/task").glob("*/children"):
        for pid in path.read_text().split():
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found["worker"] = int(pid)
    return found


def forget_peaks(server: Server) -> None:
    """Let the peaks of memory begin anew."""
    for pid in processes(server).values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mb(server: Server) -> dict[str, int]:
    """Return the peak of the resident memory of service and worker since it was forgotten."""
    peaks = {}
    for name, pid in processes(server).items():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        peaks[name] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1000
    return peaks


def cpu_ms(server: Server) -> Counter[str]:
    """Return the CPU milliseconds of service with worker, of Redis and of this process, and the `time`."""
    used = harness.cpu_ms(server)
    used["service"] += used["redis"]  # which this service did not start
    return used


# conversations ---------------------------------------------------------------------------------------


async def measure_conversations(bench: Bench, share: int) -> Figures:
    """Return what the worker makes of each conversation."""
    talks = bench.talks[: max(1, len(bench.talks) // share)]
    for talk in talks:
        await bench.put(Owner(talk.name), talk.memories, talk.vectors)
        # not the same user: topics and profile are measured without what a caller tells of the turns
        named = [{**one, "entities": [one["text"].partition(":")[0]]} for one in talk.memories]
        await bench.put(Owner(f"{talk.name} named"), named, talk.vectors)
    bench.clear()
    rows = {}
    async with bench.serving(worker=True) as server, httpx.AsyncClient(base_url=server.url) as http:
        for talk in talks:
            rows[talk.name] = await _made_of(bench, http, talk)
            print(f"=== {talk.name}:", json.dumps(rows[talk.name], indent=1, ensure_ascii=False), flush=True)
    return {"conversations": rows}


async def _made_of(bench: Bench, http: httpx.AsyncClient, talk: Talk) -> Figures:
    owner, named = Owner(talk.name), Owner(f"{talk.name} named")
    started = time.perf_counter()
    for kind in ("link", "topics", "profile"):
        await bench.done(owner, kind)
    days = {one["event_date"] for one in talk.memories}
    periods = sorted({pair for day in days for pair in names_of(datetime.fromisoformat(day))})
    periods = [pair for kind in SHAPES for pair in [one for one in periods if one[0] == kind][-PERIODS:]]
    bench.queue(owner, *(f"summary:{kind}:{name}" for kind, name in periods))
    people = sorted({one["text"].partition(":")[0] for one in talk.memories})
    bench.queue(named, *(f"summary:entity:{person}" for person in people))
    assert await bench.idle()
    took_s = time.perf_counter() - started
    count_tokens = bench.service.embedder.count_tokens
    told = {path: (await http.get(f"/v1/users/{owner.user}/{path}")).json() for path in ("topics", "profile")}
    profile, topics = told["profile"], told["topics"]
    texts = _summaries(bench.redis, owner) + _summaries(bench.redis, named)
    tokens: dict[str, list[int]] = defaultdict(list)
    for name, text in texts:
        tokens[name.partition(":")[0]] += count_tokens([text])
    _show_texts(talk.name, profile, texts)
    return {
        "memories": len(talk.memories),
        "s": round(took_s, 1),
        "topics": {topic["label"]: topic["size"] for topic in topics["topics"]},
        "uncategorized": round(topics["uncategorized"] / len(talk.memories), 3),
        "summaries": {
            kind: {
                "made": len(counts),
                "largest": max(counts),
                "budget": BUDGETS[kind],
                "over": sum(one > BUDGETS[kind] for one in counts),
            }
            for kind, counts in sorted(tokens.items())
        },
        "asked": {"period": len(periods), "entity": len(people), "topic": len(topics["topics"])},
        "profile": {
            key: len(value) if isinstance(value, list | dict) else int(bool(value))
            for key, value in profile.items()
            if key not in ABOUT
        },
        "context_summary": {
            "tokens": count_tokens([profile["context_summary"]])[0],
            "budget": BUDGETS["profile"],
        },
    }


def _summaries(redis: Redis, owner: Owner) -> list[tuple[str, str]]:
    names = [raw.decode() for raw in redis.zrange(owner.summarized, 0, -1)]
    return [(name, redis.hget(owner.summary_prefix + name, "text").decode()) for name in names]


def _show_texts(name: str, profile: Figures, texts: Sequence[tuple[str, str]]) -> None:
    """Print a profile and a few summaries of each kind: for the reader, never kept."""
    print(f"\n=== {name}: profile\n{json.dumps(profile, indent=1, ensure_ascii=False)}")
    seen: Counter[str] = Counter()
    for what, text in texts:
        seen[kind := what.partition(":")[0]] += 1
        if seen[kind] <= (SHOWN if kind == "topic" else 1):
            print(f"--- {what}\n{text}")


# sizes -----------------------------------------------------------------------------------------------


async def measure_sizes(bench: Bench, share: int) -> Figures:
    """Return seconds and memory of each job, by size of the user."""
    sizes = [size for size in SIZES if size <= SIZES[-1] // share]
    owners = {size: await bench.put_grown(size) for size in sizes}
    bench.clear()
    rows: Figures = {}
    bench.redis.config_set("slowlog-log-slower-than", 1000)
    async with bench.serving(worker=True) as server:
        idle_mb = peak_mb(server)["service"]
        for size, owner in owners.items():
            row = rows[f"{size}"] = {"similar pairs": _similar_pairs(bench, size)}
            for kind in ("topics", "profile", "summary", "summaries", "link"):
                row[kind] = await _cost(bench, server, owner, kind)
                print(f"{size:7,} {kind:10}", row[kind], flush=True)
        done = jobs_done(bench)
    return {"idle_service_mb": idle_mb, "rows": rows, "jobs": done}


async def _cost(bench: Bench, server: Server, owner: Owner, kind: str) -> Figures:
    """Return seconds of a job, peaks of memory, and the longest command of Redis meanwhile."""
    largest = [f"summary:topic:{raw.decode()}" for raw in bench.redis.zrevrange(owner.topics, 0, -1)]
    bench.hold_summaries(owner)  # until they are measured
    forget_peaks(server)
    bench.redis.slowlog_reset()
    cost: Figures = {}
    if kind == "summaries":
        names, started = largest[:SUMMARIES], time.perf_counter()
        bench.queue(owner, *names)
        assert await bench.idle()
        cost |= {"n": len(names), "s": round(time.perf_counter() - started, 3)}
    elif kind != "summary" or largest:
        seconds = await bench.done(owner, largest[0] if kind == "summary" else kind)
        cost["s"] = f"not done in {PATIENCE_S:g}" if seconds is None else round(seconds, 4)
    held_ms = [row["duration"] / 1000 for row in bench.redis.slowlog_get(128)]
    cost |= {"peak_mb": peak_mb(server), "longest_redis_ms": round(max(held_ms, default=0.0), 1)}
    if kind == "topics":
        in_topics = sum(score for _, score in bench.redis.zrange(owner.topics, 0, -1, withscores=True))
        cost["topics"] = bench.redis.zcard(owner.topics)
        cost["uncategorized"] = round(1 - in_topics / bench.redis.zcard(owner.ids), 3)
    elif kind == "link":
        cost["left"] = bench.redis.scard(owner.fresh)
    return cost


def _similar_pairs(bench: Bench, size: int) -> float:
    """Return the share of edges whose texts are compared, of a sample of the user."""
    _, vectors = grown(bench.talks, size)
    rows = range(0, size, max(1, size // SAMPLE))
    cosines = [cosine for near in nearest(vectors, rows) for _, cosine in near]
    return round(statistics.mean(cosine >= SIMILAR for cosine in cosines), 3)


# drain -----------------------------------------------------------------------------------------------


async def measure_drain(bench: Bench, share: int) -> Figures:
    """Return jobs a second when many small users have everything pending."""
    bench.clear()
    for number in range(DRAINED_USERS // share):
        memories, vectors = grown(bench.talks, DRAINED_MEMORIES, SEED + number)
        await bench.put(Owner(f"small{number}"), memories, vectors)
    waiting = bench.redis.zrange(JOBS_LATER, 0, -1)
    kinds = Counter(raw.decode().partition(" ")[2].partition(":")[0] for raw in waiting)
    # due only when the service has started
    bench.redis.zadd(JOBS_LATER, dict.fromkeys(waiting, NEVER))
    async with bench.serving(worker=True) as server:
        before, done_before = cpu_ms(server), jobs_done(bench)
        started = time.perf_counter()
        bench.redis.zadd(JOBS_LATER, dict.fromkeys(waiting, int(time.time() * 1000)))
        is_idle = await bench.idle(DRAIN_S)
        took_s = time.perf_counter() - started
        used = cpu_ms(server) - before
        n, left = jobs_done(bench) - done_before, bench.redis.zcard(JOBS_LATER) + bench.redis.xlen(JOBS)
    print(f"drain: {n} jobs in {took_s:.1f} s", flush=True)
    return {
        "users": f"{DRAINED_USERS // share} x {DRAINED_MEMORIES}",
        "waiting": dict(kinds),
        "done": n,
        "s": round(took_s, 2),
        "jobs_per_s": round(n / took_s, 1),
        "emptied": is_idle,
        "left": left,
        "cpu_ms": used,
    }


# reads -----------------------------------------------------------------------------------------------


class OpenLoop:
    """Sends searches at a fixed rate; a late one counts from when it was due."""

    def __init__(self, bench: Bench) -> None:
        # what one process searched is in Redis for the other: nothing is asked twice
        self._texts = (text for n in count(1_000) for text in sentences(500, n, (4, 8)))
        self._chooser = np.random.default_rng(SEED)
        self._vectors = np.concatenate([talk.vectors for talk in bench.talks])

    def _bodies(self, kind: str) -> Iterator[Figures]:
        for number in count():
            if kind == "hybrid":
                yield {"text": next(self._texts)}
            elif number % 2:
                yield {"text": next(self._texts), "search_mode": "keyword"}
            else:
                one = self._vectors[self._chooser.integers(len(self._vectors))]
                noisy = one + self._chooser.standard_normal(len(one)) * 0.01
                yield {"vector": np.round(noisy, 5).tolist(), "search_mode": "semantic"}

    async def run(self, url: str, kind: str, seconds: float) -> list[float]:
        """Return the milliseconds of each search."""
        rate, free, took_ms = RATES_PER_S[kind], list[Connection](), list[float]()
        started = time.perf_counter() + 0.05

        async def one(number: int, body: Figures) -> None:
            due = started + number / rate
            await asyncio.sleep(due - time.perf_counter())
            http = free.pop() if free else Connection(url)
            path = f"/v1/users/reader{self._chooser.integers(READERS)}/search"
            status, raw = await http.request("POST", path, body)
            free.append(http)
            if number >= rate * SETTLE_S / 2:
                took_ms.append((time.perf_counter() - due) * 1000)
            assert status == 200, raw
            assert b'"served_by":"l3"' in raw, raw[-200:]

        bodies = islice(self._bodies(kind), int(rate * seconds))
        await asyncio.gather(*(one(number, body) for number, body in enumerate(bodies)))
        for http in free:  # a server closes idle ones
            http.close()
        return took_ms


async def kept_busy(bench: Bench, owner: Owner, kinds: Sequence[str]) -> None:
    """Queue jobs of a large user again whenever none is due, as long as this is not cancelled."""
    ids = bench.redis.zrange(owner.ids, -LINKED, -1)
    largest = [raw.decode() for raw in bench.redis.zrevrange(owner.topics, 0, SUMMARIES - 1)]
    names = [kind for kind in kinds if kind != "summary"]
    names += [f"summary:topic:{number}" for number in largest if "summary" in kinds]
    while True:
        if not bench.due():
            bench.redis.sadd(owner.fresh, *ids)
            bench.queue(owner, *names)
        await asyncio.sleep(0.05)


@asynccontextmanager
async def _work(bench: Bench, owner: Owner, kinds: Sequence[str]) -> AsyncIterator[None]:
    """Keep the worker busy meanwhile; it is idle before and after."""
    task = asyncio.create_task(kept_busy(bench, owner, kinds)) if kinds else None
    await asyncio.sleep(SETTLE_S)
    try:
        yield
    finally:
        if task:
            task.cancel()
        bench.redis.delete(JOBS_LATER)
        await bench.idle()


async def measure_reads(bench: Bench, share: int) -> Figures:
    """Return latencies of searches without a worker, and with one that is busy with each kind of work."""
    busy = await bench.put_grown(BUSY_MEMORIES // share)
    for number in range(READERS):
        await bench.put(Owner(f"reader{number}"), *grown(bench.talks, READERS_MEMORIES, SEED + number))
    bench.clear()
    bench.hold_summaries(busy)
    seen: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    done: Counter[str] = Counter()
    used_ms: dict[str, Counter[str]] = defaultdict(Counter)
    async with bench.serving(worker=False) as without, bench.serving(worker=True) as working:
        loop = OpenLoop(bench)
        for server in (without, working):  # warm-up
            for load in RATES_PER_S:
                await loop.run(server.url, load, SETTLE_S)
        await bench.done(busy, "topics")
        phases = [("no worker", without, ()), *((name, working, kinds) for name, kinds in WORK.items())]
        for number in range(max(1, ROUNDS // share)):
            for name, server, kinds in phases[:: -1 if number % 2 else 1]:
                before, used_before = jobs_done(bench), cpu_ms(working)
                async with _work(bench, busy, kinds):
                    for load in RATES_PER_S:
                        seen[load, name].append(await loop.run(server.url, load, PHASE_S))
                    used_ms[name] += cpu_ms(working) - used_before
                done[name] += jobs_done(bench) - before
    meanwhile = {name: {"jobs": done[name], "cpu_ms": dict(used_ms[name])} for name in used_ms}
    return _shown_reads(seen) | {"meanwhile": meanwhile}


def _shown_reads(seen: dict[tuple[str, str], list[list[float]]]) -> Figures:
    rows: Figures = {}
    for (kind, name), rounds in seen.items():
        every = [percentiles(times) for times in rounds]
        medians = {p: round(statistics.median(row[p] for row in every), 2) for p in ("p50", "p95", "p99")}
        rows.setdefault(kind, {})[name] = {
            **medians,
            "p95_rounds": [row["p95"] for row in every],
            "n": sum(map(len, rounds)),
        }
    for kind, row in rows.items():
        alone = row["no worker"]["p95"]
        for name, one in row.items():
            one["p95 / no worker's"] = round(one["p95"] / alone, 2)
            print(f"{RATES_PER_S[kind]:4}/s {kind:20} {name:26}", one, flush=True)
    return {"bar": "p95 / no worker's <= 1.5", "rows": rows}


# profile ---------------------------------------------------------------------------------------------


async def measure_profile(bench: Bench, share: int) -> Figures:
    """Return reads of a profile by one client, from L1 and from Redis, beside an empty endpoint."""
    owner = await bench.put_grown(PROFILE_MEMORIES)
    bench.clear()
    async with bench.serving(worker=True):
        bench.hold_summaries(owner)
        for kind in ("topics", "profile"):
            assert await bench.done(owner, kind) is not None
    get = request_bytes("GET", f"/v1/users/{owner.user}/profile")
    tallies: dict[str, Tally] = defaultdict(Tally)
    async with (
        bench.serving(worker=False) as cached,
        bench.serving(worker=False, REDISMEM_L1_ENTRIES="0") as bare,
    ):
        replies: list[bytes] = []
        await closed_loop(cached.url, repeat(("", get), 1), lambda *one: replies.append(one[2]))
        size = len(replies[0].partition(b"\r\n\r\n")[2])
        with harness.empty_endpoint(size) as empty:
            targets = [
                ("l1", cached.url, get),
                ("redis", bare.url, get),
                ("empty", empty, request_bytes("POST", "/large")),
            ]
            for block in range(-1, max(2, PROFILE_BLOCKS // share)):
                if block <= 0:  # the first was warm-up
                    tallies.clear()
                for name, url, content in targets[:: -1 if block % 2 else 1]:
                    tallies[name].seconds += await closed_loop(
                        url, repeat((name, content)), tallies[name].saw, seconds=PROFILE_BLOCK_S
                    )
    rows = {name: percentiles(tally.times[name]) for name, tally in tallies.items()}
    assert not any(tally.errors for tally in tallies.values())
    floor = rows["empty"]["p95"]
    bars = {"l1": (rows["l1"]["p95"], "<", 1.0), "redis": (rows["redis"]["p95"], "<", 5.0)}
    print("profile reads:", rows, flush=True)
    return {
        "reply_bytes": size,
        "rows": rows,
        "bars_p95_ms": bars,
        "p95 / the empty endpoint's": {name: round(rows[name]["p95"] / floor, 2) for name in bars},
    }


# topics ----------------------------------------------------------------------------------------------


async def measure_topics(bench: Bench, share: int, queries: Vectors) -> Figures:
    """Return recall and time of searches of the nearest topics only, beside those of everything."""
    owner = await bench.put_grown(SIZES[-1] if share == 1 else SIZES[1])
    if not bench.redis.zcard(owner.topics):
        bench.clear()
        async with bench.serving(worker=True):
            bench.hold_summaries(owner)
            assert await bench.done(owner, "topics") is not None
    bench.store.settle()
    # the worker let the index know topics: RediSearch scans for that in the background
    facts = dict(zip(*(iter(bench.redis.execute_command("FT.INFO", owner.index)),) * 2, strict=True))
    assert not int(facts[b"indexing"]), facts
    took_ms: dict[int | None, list[float]] = defaultdict(list)
    found: dict[int | None, list[float]] = defaultdict(list)
    for number, query in enumerate(queries[: WARM_UP + QUERIES // share]):
        best: set[str] = set()
        for few in NEAREST:
            request = SearchRequest(vector=query.tolist(), search_mode="semantic", nearest_topics=few)
            started = time.perf_counter()
            reply = (await bench.service.reader.search_each(owner, [request]))[0].reply
            ms = (time.perf_counter() - started) * 1000
            ids = {hit.id for hit in reply.memories}
            best = best or ids
            assert few is None or reply.skipped == ["topics"], reply.skipped
            if number >= WARM_UP:
                took_ms[few].append(ms)
                found[few].append(len(ids & best) / len(best))
    every = percentiles(took_ms[None])
    rows = {}
    for few in NEAREST:
        row = percentiles(took_ms[few])
        speed_up = {p: round(every[p] / row[p], 2) for p in ("p50", "p95")}
        rows[str(few or "all")] = {
            "recall@10": round(statistics.mean(found[few]), 4),
            **row,
            "speed_up": speed_up,
        }
        print(f"nearest topics {few or 'all'!s:4}", rows[str(few or "all")], flush=True)
    sizes = [score for _, score in bench.redis.zrange(owner.topics, 0, -1, withscores=True)]
    return {
        "memories": bench.redis.zcard(owner.ids),
        "topics": len(sizes),
        "in_topics": int(sum(sizes)),
        "rows": rows,
    }


# -----------------------------------------------------------------------------------------------------


async def run(parts: Sequence[str], files: Sequence[Path], share: int) -> Figures:
    """Measure the parts on one store."""
    corpus, embedder = await conversations(files), await open_embedder(Settings())
    talks, first = [], 0
    for path in files:
        memories = turns(json.loads(path.read_text())["conversation"])
        talks.append(Talk(path.stem, memories, corpus.vectors[first : first + len(memories)]))
        first += len(memories)
    ready = Ready(embedder)
    measures: dict[str, Callable[[Bench, int], Any]] = {
        "conversations": measure_conversations,
        "sizes": measure_sizes,
        "drain": measure_drain,
        "reads": measure_reads,
        "profile": measure_profile,
        "topics": lambda bench, share: measure_topics(bench, share, corpus.queries),
    }
    figures: Figures = {}
    async with opened(ready) as store:
        await claim(store.functions.client, ready)
        store.redis.hset(STORE, mapping={"schedule:hourly": NEVER, "schedule:nightly": NEVER})
        async with assembled(Settings(l2_searches=0), store.functions.client, ready) as service:
            bench = Bench(store, service, ready, talks)
            for part in parts:
                started, load = time.perf_counter(), os.getloadavg()[0]
                figures[part] = await measures[part](bench, share)
                took_s = round(time.perf_counter() - started, 1)
                figures[part] |= {
                    "took_s": took_s,
                    "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
                }
                print(f"# {part}: {took_s} s, load average {figures[part]['load_average']}\n", flush=True)
                if dead := store.redis.hgetall(JOBS_DEAD):
                    figures[part]["dead letters"] = [
                        f"{job.decode()}: {raw.decode()}" for job, raw in dead.items()
                    ]
                    print("DEAD LETTERS", figures[part]["dead letters"])
                    store.redis.delete(JOBS_DEAD)
        figures["redis"] = store.versions
    await embedder.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="conversations, one .json file each")
    parser.add_argument("--quick", action="store_true", help="small and short; writes nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="merged into the result")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        parser.error(f"no .json files in {arguments.folder}")
    figures = harness.run(run(arguments.only, files, 5 if arguments.quick else 1))
    if arguments.quick:
        return
    kept = harness.RESULTS / "worker.json"
    old = json.loads(kept.read_text())["figures"] if kept.exists() else {}
    redis, data = figures.pop("redis"), b"".join(path.read_bytes() for path in files)
    print(harness.write_result("worker", {"redis": redis, "figures": old | figures}, data))


if __name__ == "__main__":
    main()
