"""What the worker makes of memories and what that costs: conversations, sizes, drain of bench/worker.py."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import httpx
from redis import Redis

sys.path.insert(0, str(Path(__file__).parent))
from harness import Server
from workerstage import (
    NEVER,
    PATIENCE_S,
    SEED,
    SIZES,
    SUMMARIES,
    Bench,
    Figures,
    Talk,
    cpu_ms,
    grown,
    jobs_done,
)

from redismem.keys import JOBS, JOBS_LATER, Owner
from redismem.periods import SHAPES, names_of
from redismem.similarity import SIMILAR, nearest
from redismem.views import BUDGETS

#: of each kind, the last ones of a conversation are summarised
PERIODS = 6
SHOWN = 3
#: of a profile, what tells nothing of the user
ABOUT = {"user_id", "compiled_at", "valid_until", "patched", "generation", "context_summary"}
#: memories whose edges are looked at
SAMPLE = 500
DRAINED_USERS, DRAINED_MEMORIES, DRAIN_S = 200, 20, 90.0


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
