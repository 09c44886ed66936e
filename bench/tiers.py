"""What does each tier cost, and what does the service carry?

All over HTTP against a real `redismem serve` on this machine, by closed-loop clients in this process:
L1 hits beside an empty Starlette endpoint; L2 hits of a server without L1; cold searches beside their floor
(one embedding and one raw FT.SEARCH, called directly), by one client and by 16; and the seed mix of reads and
updates. What is compared is measured in turn, and whoever is not measured is idle.
Usage: python bench/tiers.py [--quick] [--only l1 cold l2 mix]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from itertools import accumulate, count, repeat
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import Request, Server, Tally, closed_loop, percentiles, sentences
from read_path import floor, load

from redismem.embed import open_embedder
from redismem.settings import Settings

Figures = dict[str, Any]

PARTS = ("l1", "cold", "l2", "mix")
SEED = 23
USER = "user"
MEMORIES = 1_000
QUERY_WORDS = (4, 8)
CLIENTS = 16
BLOCKS = 5
BLOCK_S = 2.0
#: starting and draining 16 clients takes 1 % of it
COLD_BLOCK_S = 5.0
#: fewer than a user may keep in L2 (128)
L2_QUERIES = 100
L2_ROUNDS = 20

#: no refusing: in a closed loop whoever is refused asks again at once (bench/load.py measures it); and no
#: worker: bench/worker.py and bench/load.py measure its share
SERVER = {"REDISMEM_OVERLOAD_MS": "0", "REDISMEM_WORKER": "0"}

MIX_USERS = 100
MIX_MEMORIES = 100
MIX_QUERIES = 50
MIX_CLIENTS = 50
MIX_S = 60.0
MIX_WARM_UP_S = 10.0
MIX_WORKERS = (1, 2)
#: the seed mix; it names no kind of update: half are new texts (embedded anew), half new metadata
MIX = {"search": 0.80, "get": 0.15, "patch text": 0.025, "patch metadata": 0.025}
#: nor a distribution: this is Zipf's. Of 100 users the first makes 19 % of the requests, the last ten 2 %,
#: so with each user's queries and memories. How much of it are repeats is measured and reported.
ZIPF = 1.0
#: a search is a repeat if it was asked within so many seconds before: the TTL of search results
REPEAT_S = 60.0


@lru_cache(MIX_USERS * MIX_QUERIES)
def search_bytes(text: str, user: str = USER) -> bytes:
    return harness.request_bytes("POST", f"/v1/users/{user}/search", {"text": text})


def l1_stats(server: Server, processes: int = 1) -> list[dict[str, Any]]:
    """Return what L1 holds and did in each process; which one answers is chance."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < processes:
        told = httpx.get(server.url + "/v1/stats").json()
        found[told["process"]] = told["l1"]
    return list(found.values())


@asynccontextmanager
async def direct(server: Server) -> AsyncIterator[Callable[[str], Awaitable[float]]]:
    """Yield the floor: a function that embeds and searches a text without the service, and returns ms."""
    raw, embedder = AsyncRedis.from_url(server.redis_url + "?protocol=2"), await open_embedder(Settings())

    async def one(text: str) -> float:
        return sum(await floor(raw, embedder, USER, text))

    yield one
    await embedder.close()
    await raw.aclose()


async def measure_l1(server: Server, redis: Redis, share: int) -> Figures:
    """Return one search again and again beside the empty endpoint, and what Redis did meanwhile."""
    hot = search_bytes(sentences(1, SEED + 1, QUERY_WORDS)[0])
    small = hot.replace(f"/v1/users/{USER}/search".encode(), b"/", 1)
    large = small.replace(b"POST / ", b"POST /large ", 1)
    replies: list[bytes] = []
    await closed_loop(server.url, repeat(("warm", hot), 2), lambda *seen: replies.append(seen[2]))
    size = len(replies[-1].partition(b"\r\n\r\n")[2])
    tallies: dict[tuple[str, int], Tally] = {}
    calls: dict[int, Counter[str]] = {}
    with harness.empty_endpoint(size) as empty:
        targets = [("l1", server.url, hot), ("empty", empty, small), ("empty, same size", empty, large)]
        for block in range(-1, max(1, BLOCKS // share)):
            if block <= 0:  # the first was warm-up
                tallies, calls = defaultdict(Tally), defaultdict(Counter)
            for clients in (1, CLIENTS):
                for name, url, content in targets[:: 1 if block % 2 else -1]:
                    tally, before = tallies[name, clients], harness.redis_calls(redis)
                    tally.seconds += await closed_loop(
                        url, repeat((name, content)), tally.saw, clients=clients, seconds=BLOCK_S
                    )
                    if name == "l1":
                        calls[clients] += harness.redis_calls(redis) - before
            before = harness.redis_calls(redis)
            await asyncio.sleep(BLOCK_S)
            calls[0] += harness.redis_calls(redis) - before
    seen: Figures = {f"{name}, {n} clients": tally.figures() for (name, n), tally in tallies.items()}
    p50s = [seen[f"{name}, 1 clients"][name]["p50"] for name in ("l1", "empty")]
    rates = [seen[f"{name}, {CLIENTS} clients"]["per_s"] for name in ("l1", "empty")]
    # heartbeats and touches go by the clock, commands of hits would come with the hits
    hits = {n: tallies["l1", n].served["l1"] if n else 0 for n in sorted(calls)}
    more_calls = calls[CLIENTS].total() - calls[1].total()
    return {
        "bars": {
            "p50 / the empty endpoint's": (p50s[0] / p50s[1], "<=", 1.5),
            "requests a second / the empty endpoint's": (rates[0] / rates[1], ">=", 0.6),
            "Redis commands a hit": (more_calls / (hits[CLIENTS] - hits[1]), "<=", 0.01),
        },
        **seen,
        "redis_calls": {f"{n} clients": {"hits": hits[n], **calls[n]} for n in hits},
        "reply_bytes": size,
    }


async def measure_l2(server: Server, redis: Redis, share: int) -> Figures:
    """Return searches that only Redis remembers, and the commands of one."""
    hot = [("l2", search_bytes(text)) for text in sentences(L2_QUERIES, SEED + 2, QUERY_WORDS)]
    await closed_loop(server.url, iter(hot * 2), lambda *_: None)
    tally, before = Tally(), harness.redis_calls(redis)
    tally.seconds = await closed_loop(server.url, iter(hot * (L2_ROUNDS // share)), tally.saw)
    calls = {name: times / tally.n for name, times in sorted((harness.redis_calls(redis) - before).items())}
    return {
        "bars": {
            "not served by L2": (tally.n - tally.served["l2"], "<=", 0),
            "embeddings": (tally.embedded, "<=", 0),
            "FCALL_RO and GET a search": (calls["fcall_ro"] + calls["get"], "<=", 2),
            "reads of Redis from its sockets a search (one pipeline)": (calls["reads"], "<=", 1.1),
        },
        **tally.figures(),
        "redis_calls_a_request": calls,
    }


async def measure_cold(server: Server, redis: Redis, share: int, clients: int) -> Figures:
    """Return new searches over HTTP, beside as many tasks that call the floor."""
    texts = (text for n in count(clients * 1_000) for text in sentences(1_000, n, QUERY_WORDS))
    async with direct(server) as floor_of:

        async def over_http(tally: Tally) -> float:
            requests = (("http", search_bytes(text)) for text in texts)
            return await closed_loop(server.url, requests, tally.saw, clients=clients, seconds=COLD_BLOCK_S)

        async def directly(tally: Tally) -> float:
            started_s = time.perf_counter()

            async def client() -> None:
                while time.perf_counter() < started_s + COLD_BLOCK_S:
                    tally.times["floor"].append(await floor_of(next(texts)))

            await asyncio.gather(*(client() for _ in range(clients)))
            return time.perf_counter() - started_s

        runs = {"http": over_http, "floor": directly}
        tallies: dict[str, Tally] = {}
        blocks: list[Figures] = []
        for block in range(-1, max(1, BLOCKS // share)):
            if block <= 0:  # the first was warm-up
                tallies, blocks = defaultdict(Tally), []
            row: Figures = {}
            for name in sorted(runs, reverse=block % 2 == 0):
                tally, done, before = tallies[name], tallies[name].n, harness.cpu_ms(server)
                seconds = await runs[name](tally)
                tally.seconds += seconds
                used = harness.cpu_ms(server) - before
                row[name] = {"per_s": (tally.n - done) / seconds, "cpu_ms": used}
            blocks.append({"ratio": row["http"]["per_s"] / row["floor"]["per_s"], **row})
    seen = {name: tally.figures() for name, tally in tallies.items()}
    ratio = statistics.median(row["ratio"] for row in blocks)
    bars: Figures = {"not from the index": (tallies["http"].n - tallies["http"].served["l3"], "<=", 0)}
    if clients > 1:
        bars["searches a second / the floor's, median"] = (ratio, ">=", 0.9)
    return {"bars": bars, **seen, "blocks": blocks}


def mixed(users: int, queries: list[str], asked: list[tuple[float, str]]) -> Iterator[Request]:
    """Yield requests of the seed mix without end; append when which search is asked."""
    chooser = random.Random(SEED)
    kinds, shares = list(MIX), list(accumulate(MIX.values()))
    sums = list(accumulate(rank**-ZIPF for rank in range(1, 1 + max(users, MIX_QUERIES, MIX_MEMORIES))))

    def one_of(n: int) -> int:
        return chooser.choices(range(n), cum_weights=sums[:n])[0]

    for revision in count():
        kind, user = chooser.choices(kinds, cum_weights=shares)[0], one_of(users)
        if kind == "search":
            text = queries[user * MIX_QUERIES + one_of(MIX_QUERIES)]
            asked.append((time.perf_counter(), text))
            yield kind, search_bytes(text, f"mix{user}")
            continue
        path = f"/v1/users/mix{user}/memories/m{one_of(MIX_MEMORIES)}"
        if kind == "get":
            yield kind, harness.request_bytes("GET", path)
            continue
        text = f"{chooser.choice(queries)} at {revision}"
        change = {"text": text} if kind == "patch text" else {"metadata": {"revision": revision}}
        yield kind, harness.request_bytes("PATCH", path, change)


def repeats(asked: list[tuple[float, str]], since_s: float) -> dict[str, float]:
    """Return how much of what was asked since then had been asked shortly before."""
    last_s: dict[str, float] = {}
    again, counted = 0, list[str]()
    for at_s, text in asked:
        if at_s >= since_s:
            counted.append(text)
            again += at_s - last_s.get(text, -REPEAT_S) < REPEAT_S
        last_s[text] = at_s
    return {"repeats": again / len(counted), "distinct": len(set(counted)) / len(counted)}


async def measure_mix(server: Server, redis: Redis, share: int, workers: int) -> Figures:
    """Return the seed mix: all operations together, and each."""
    users = MIX_USERS // share
    queries = sentences(users * MIX_QUERIES, SEED + 5, QUERY_WORDS)
    http = harness.Connection(server.url)
    for user in range(users):
        batch = [{"id": f"m{i}", "text": text} for i, text in enumerate(sentences(MIX_MEMORIES, user))]
        status, reply = await http.request("POST", f"/v1/users/mix{user}/memories", {"memories": batch})
        assert status == 201, reply
    _, reply = await http.request("POST", "/v1/users/mix0/search", {"text": queries[0]})
    http.close()

    async def ran(url: str, requests: Iterator[Request], seconds: float) -> Tally:
        tally = Tally()
        tally.seconds = await closed_loop(url, requests, tally.saw, clients=MIX_CLIENTS, seconds=seconds)
        return tally

    with harness.empty_endpoint(len(reply)) as empty:
        nothing = mixed(users, queries, [])
        emptied = ((name, b"POST /large" + raw[raw.index(b" HTTP/1.1") :]) for name, raw in nothing)
        ceiling = await ran(empty, emptied, BLOCK_S)
    asked: list[tuple[float, str]] = []
    requests = mixed(users, queries, asked)
    warm_up = await ran(server.url, requests, MIX_WARM_UP_S / share)
    l1, redis_bytes = [l1_stats(server, workers)], [redis.info("memory")["used_memory"]]
    before, started_s = harness.cpu_ms(server), time.perf_counter()
    tally = await ran(server.url, requests, MIX_S / share)
    used = harness.cpu_ms(server) - before
    l1.append(l1_stats(server, workers))
    redis_bytes.append(redis.info("memory")["used_memory"])
    gets_from_l1 = [sum(one["memory"]["hits"] for one in stats) for stats in l1]
    hits = {"search": tally.served["l1"] + tally.served["l2"], "get": gets_from_l1[1] - gets_from_l1[0]}
    reads = sum(len(tally.times[name]) for name in hits)
    every = percentiles([took_ms for times in tally.times.values() for took_ms in times])
    return {
        "bars": {
            "hit rate": (sum(hits.values()) / reads, ">=", 0.7),
            "operations a second": (tally.n / tally.seconds, ">=", 1_000),
            "p95 ms": (every["p95"], "<=", 100),
            "p99 ms": (every["p99"], "<=", 200),
            "errors": (tally.errors.total(), "<=", 0),
        },
        "every operation": every,
        **tally.figures(),
        "hit_rates": {name: hits[name] / len(tally.times[name]) for name in hits},
        "share_of_searches": repeats(asked, started_s),
        "cpu_ms": used,
        "embedded": tally.embedded,
        "warm-up": warm_up.figures(),
        "generator_ceiling_per_s": ceiling.figures()["per_s"],
        "l1": [stats["total"] for stats in l1[1]],
        "redis_bytes": redis_bytes,
    }


async def measure(parts: Sequence[str], share: int) -> Figures:
    """Return the figures by part."""
    figures: Figures = {}

    @asynccontextmanager
    async def loaded(**environment: str) -> AsyncIterator[tuple[Server, Redis]]:
        with (
            harness.running_server(**SERVER, **environment) as server,
            Redis.from_url(server.redis_url) as redis,
        ):
            figures["redis"] = server.redis_info
            await load(harness.Connection(server.url), USER, sentences(MEMORIES, SEED))
            yield server, redis

    async with loaded() as running:
        if "l1" in parts:
            figures["l1"] = await measure_l1(*running, share)
        for clients in (1, CLIENTS) if "cold" in parts else ():
            figures[f"cold, {clients} clients"] = await measure_cold(*running, share, clients)
    if "l2" in parts:
        async with loaded(REDISMEM_L1_ENTRIES="0") as running:
            figures["l2"] = await measure_l2(*running, share)
    for workers in MIX_WORKERS if "mix" in parts else ():
        async with loaded(REDISMEM_WORKERS=str(workers)) as running:
            figures[f"mix, {workers} workers"] = await measure_mix(*running, share, workers)
    return figures


def show(figures: Figures, name: str = "") -> None:
    """Print what has percentiles or a rate, one a line."""
    if "p50" in figures:
        p50, p95, p99, n = (figures[column] for column in ("p50", "p95", "p99", "n"))
        print(f"{name:48}{p50:10.2f}{p95:10.2f}{p99:10.2f} ms{n:10}")
    elif "per_s" in figures:
        print(f"{name:48}{figures['per_s']:10.0f} /s  {figures.get('served_by') or ''}")
    for key, part in figures.items():
        if isinstance(part, dict):
            show(part, f"{name}: {key}" if name else key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixth of everything; writes nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="writes nothing")
    arguments = parser.parse_args()
    figures = harness.run(measure(arguments.only, 6 if arguments.quick else 1))
    show(figures)
    for part, row in figures.items():
        for name, (value, sign, bar) in row.get("bars", {}).items():
            met = value <= bar if sign == "<=" else value >= bar
            print(f"{part + ': ' + name:64}{value:10.3f} {sign} {bar:<8g}{'' if met else 'MISSED'}")
    if arguments.quick or arguments.only != PARTS:
        print(json.dumps(figures, indent=1))
    else:
        print(harness.write_result("tiers", {"redis": figures.pop("redis"), "figures": figures}))


if __name__ == "__main__":
    main()
