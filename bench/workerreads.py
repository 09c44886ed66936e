"""Who has to wait for the worker, and who reads what it made: reads, profile, topics of bench/worker.py."""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import count, islice, repeat
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import Tally, closed_loop, percentiles, request_bytes, sentences
from openloop import Due, OpenLoop, Table
from workerstage import SEED, SIZES, SUMMARIES, Bench, Figures, cpu_ms, grown, jobs_done

from redismem.embed import Vectors
from redismem.keys import JOBS, JOBS_LATER, Owner
from redismem.types import SearchRequest

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


# reads -----------------------------------------------------------------------------------------------


class Searches:
    """Makes searches at a fixed rate, none twice: what one process searched is in Redis for the other."""

    def __init__(self, bench: Bench) -> None:
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

    async def send(self, url: str, kind: str, seconds: float) -> Table:
        """Return what became of each search but the first ones."""
        rate = RATES_PER_S[kind]
        # made before the first is due: to make them takes as long as many searches
        requests = [
            Due(
                number / rate,
                kind,
                request_bytes("POST", f"/v1/users/reader{self._chooser.integers(READERS)}/search", body),
            )
            for number, body in enumerate(islice(self._bodies(kind), int(rate * seconds)))
        ]
        # else a collection in this process, which holds whole users, is taken for a slow reply
        gc.collect()
        gc.freeze()
        table = (await OpenLoop(url).run(requests)).table().between(SETTLE_S / 2, seconds)
        assert table.ok.all(), Counter(table.status.tolist())
        assert (table.tier == 3).all(), Counter(table.tier.tolist())
        return table


async def kept_busy(bench: Bench, owner: Owner, kinds: Sequence[str]) -> None:
    """Queue jobs of a large user again whenever all are done, as long as this is not cancelled."""
    ids = bench.redis.zrange(owner.ids, -LINKED, -1)
    largest = [raw.decode() for raw in bench.redis.zrevrange(owner.topics, 0, SUMMARIES - 1)]
    names = [kind for kind in kinds if kind != "summary"]
    names += [f"summary:topic:{number}" for number in largest if "summary" in kinds]

    def refill() -> None:
        if not bench.due() and not bench.redis.xlen(JOBS):
            bench.redis.sadd(owner.fresh, *ids)
            bench.queue(owner, *names)

    while True:
        await asyncio.to_thread(refill)  # this loop sends searches
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
    seen: dict[tuple[str, str], list[Table]] = defaultdict(list)
    done: Counter[str] = Counter()
    used_ms: dict[str, Counter[str]] = defaultdict(Counter)
    async with bench.serving(worker=False) as without, bench.serving(worker=True) as working:
        searches = Searches(bench)
        for server in (without, working):  # warm-up
            for load in RATES_PER_S:
                await searches.send(server.url, load, SETTLE_S)
        await bench.done(busy, "topics")
        phases = [("no worker", without, ()), *((name, working, kinds) for name, kinds in WORK.items())]
        for number in range(max(1, ROUNDS // share)):
            for name, server, kinds in phases[:: -1 if number % 2 else 1]:
                before, used_before = jobs_done(bench), cpu_ms(working)
                async with _work(bench, busy, kinds):
                    for load in RATES_PER_S:
                        seen[load, name].append(await searches.send(server.url, load, PHASE_S))
                    used_ms[name] += cpu_ms(working) - used_before
                done[name] += jobs_done(bench) - before
    meanwhile = {name: {"jobs": done[name], "cpu_ms": dict(used_ms[name])} for name in used_ms}
    return _shown_reads(seen) | {"meanwhile": meanwhile}


def _shown_reads(seen: dict[tuple[str, str], list[Table]]) -> Figures:
    rows: Figures = {}
    for (kind, name), rounds in seen.items():
        every = [percentiles(table.took_ms.tolist()) for table in rounds]
        lags_ms = [float(np.percentile(table.lag_ms, 95)) for table in rounds]
        medians = {p: round(statistics.median(row[p] for row in every), 2) for p in ("p50", "p95", "p99")}
        rows.setdefault(kind, {})[name] = {
            **medians,
            "p95_rounds": [row["p95"] for row in every],
            "generator_lag_p95": round(statistics.median(lags_ms), 2),
            "n": sum(len(table.took_ms) for table in rounds),
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
