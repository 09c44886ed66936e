"""What do exact search and the graph cost and find, by size?

Each size is one user's memories in an embedded server of its own, as users run it (append-only file on): what
the exact index and the graph cost to build and hold; recall@10 against a linear scan in numpy, latency and
queries/s of one client in a closed loop. `search` is rm_search_ro_v1 as the product calls it in `semantic`
mode with limit 10; `raw` a bare FT.SEARCH KNN 10 (on FLAT: the floor; RediSearch's own HNSW) or VSIM. Last,
others' searches at a fixed rate while a user gets a graph (open loop: a late one counts from when it is due).

Vectors: with FOLDER (conversations in LoCoMo's format, see recall.py) `real` are of its turns, `grown`
mixtures of two of them plus noise, and queries are its questions. Without it, and at 1,536 dimensions,
`clustered`: Gaussian clusters (recovery.py), queries drawn like memories.
Usage: python bench/index.py [FOLDER] [--quick | --sizes N ...]; needs `pip install -e '.[bench]'`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from redis import Redis

sys.path.insert(0, str(Path(__file__).parent))
from harness import percentiles, write_result
from recall import questions, turns
from recovery import SEED, WARM_UP, Command, K, Store, clustered, opened, searches, timed

from redismem.client import Client
from redismem.codec import unit, vector_bytes
from redismem.embed import Vectors, open_embedder
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.graph import PROFILES, Graphs
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.settings import HnswProfile, Settings
from redismem.vectors import Turn, turn_vectors

QUERIES = 400
EFS = (64, 128, 256, 512)
DIM, WIDE_DIM = 384, 1536

#: RediSearch computes in FLOAT16, which cannot tell apart cosines nearer to each other than this
SAME = 1e-4

#: `grown`: the first turn weighs 0.5 to 1; length of the noise. The local intrinsic dimension (maximum
#: likelihood, 20 neighbours) is then 8 to 15; that of real turns is 12
GROWN_SHARE, GROWN_NOISE = 0.5, 0.3

OTHERS, OTHERS_MEMORIES, OTHERS_PER_S, OTHERS_BEFORE_S, OTHERS_BAR_MS = 200, 100, 100, 10, 50

#: what tuning guides tell of a million vectors of 1,536 dimensions: EF, recall@10, P95 ms
REFERENCE = ((64, 0.92, 12), (128, 0.96, 22), (256, 0.985, 45), (512, 0.992, 85))

#: where the plot's axis of recall is labelled: % that is missed
MISSED = (0, 0.1, 0.5, 1, 2, 5, 10)

LARGE = Owner("large")


@dataclass(frozen=True)
class Plan:
    """Memories of each run, and of those that measure more."""

    sizes: tuple[int, ...] = (1_000, 10_000, 20_000, 50_000, 100_000)
    wide_sizes: tuple[int, ...] = (100_000,)
    all_profiles: tuple[int, ...] = (10_000,)
    redisearch: tuple[int, ...] = (10_000, 50_000)
    promoted: int = 20_000


FULL = Plan()
QUICK = Plan((1_000, 5_000), (1_000,), (5_000,), (5_000,), 5_000)


@dataclass(frozen=True)
class Corpus:
    """Unit vectors of memories and of queries."""

    name: str
    vectors: Vectors
    queries: Vectors


def gaussian(count: int, dim: int) -> Corpus:
    """Return clusters; queries are drawn like memories."""
    vectors = clustered(count + QUERIES + WARM_UP, dim)
    return Corpus("clustered", vectors[:count], vectors[count:])


def grown(real: Corpus, count: int) -> Corpus:
    """Return mixtures of two real vectors plus noise, with the real queries."""
    chooser = np.random.default_rng((SEED, count))
    one, other = chooser.integers(len(real.vectors), size=(2, count))
    share = chooser.uniform(GROWN_SHARE, 1, (count, 1)).astype(np.float32)
    noise = chooser.standard_normal((count, DIM), np.float32) * (GROWN_NOISE / DIM**0.5)
    mixed = share * real.vectors[one] + (1 - share) * real.vectors[other]
    return Corpus("grown", unit(mixed + noise), real.queries)


async def conversations(files: Sequence[Path]) -> Corpus:
    """Return all turns as the product embeds them, and some questions; kept in the temporary folder."""
    embedder = await open_embedder(Settings())
    digest = sha256(b"".join(path.read_bytes() for path in files) + embedder.name.encode()).hexdigest()
    kept = Path(tempfile.gettempdir(), f"redismem-bench-{digest[:16]}.npz")
    if not kept.exists():
        talk, asked = [], []
        for document in (json.loads(path.read_text()) for path in files):
            said = turns(document["conversation"])
            for last, turn in zip([said[-1], *said], said, strict=False):
                is_next = last["session_id"] == turn["session_id"]
                talk.append(Turn(turn["text"], last["text"] if is_next else None))
            asked += [text for text, _, _ in questions(document)]
        vectors, queries = await turn_vectors(embedder, talk), await embedder.embed(asked, urgent=False)
        np.savez(kept, vectors=vectors, queries=queries)
    await embedder.close()
    with np.load(kept) as found:
        queries = np.random.default_rng(SEED).permutation(found["queries"])
        return Corpus("real", found["vectors"], queries[: QUERIES + WARM_UP])


def corpora(plan: Plan, real: Corpus | None) -> Iterator[Corpus]:
    """Make the vectors of each run, one after the other: they are large."""
    if real:
        yield real
    for size in plan.sizes:
        yield grown(real, size) if real else gaussian(size, DIM)
    yield from (gaussian(size, WIDE_DIM) for size in plan.wide_sizes)


def knn(index: str, vectors: Vectors, parameters: str = "") -> list[Command]:
    """Return bare FT.SEARCH commands for the nearest memories."""
    query = f"*=>[KNN {K} @embedding $v {parameters} AS d]"
    options = ("RETURN", 2, "d", "text", "SORTBY", "d", "LIMIT", 0, K, "DIALECT", 2)
    return [("FT.SEARCH", index, query, "PARAMS", 2, "v", vector_bytes(v), *options) for v in vectors]


def found_ids(reply: list[Any]) -> list[bytes]:
    """Return the ids in a reply of rm_search_ro_v1, FT.SEARCH or VSIM."""
    if reply[0] == b"OK":
        return reply[4::4]
    if isinstance(reply[0], int):
        return [key.removeprefix(LARGE.memory_prefix.encode()) for key in reply[1::2]]
    return reply


class Bench:
    """Measures one user's memories; prints and keeps what indexes cost and what searches find."""

    def __init__(self, corpus: Corpus, figures: dict[str, Any]) -> None:
        count, dim = corpus.vectors.shape
        self._corpus = corpus
        self._what = {"vectors": corpus.name, "memories": count, "dim": dim}
        self._embedder = DeterministicEmbedder(dim)
        self._figures = figures
        # the linear scan, of the vectors as they were before they were rounded to FLOAT16
        self._cosines = corpus.queries[WARM_UP:] @ corpus.vectors.T
        self._tenth = -np.partition(-self._cosines, K - 1)[:, K - 1, None]

    async def run(self, plan: Plan) -> None:
        """Measure the exact index, the graph, and what else the plan has at this size."""
        vectors, queries = self._corpus.vectors, self._corpus.queries
        async with opened(self._embedder) as store:
            plain, self._figures["redis"] = store.load(LARGE, vectors), store.versions
        async with opened(self._embedder) as store:
            self._built("FLAT", await store.load_indexed(LARGE, vectors), plain)
            ids = store.redis.zrange(LARGE.ids, 0, -1)
            self._places = {memory_id: place for place, memory_id in enumerate(ids)}
            self._searched("FLAT", "raw", None, store, knn(LARGE.index, queries))
            self._searched("FLAT", "search", None, store, await searches(store, LARGE, queries))
            profiles: list[HnswProfile] = list(PROFILES)
            for profile in profiles if len(vectors) in plan.all_profiles else profiles[:1]:
                await self._measure_graph(store, profile)
        if len(vectors) in plan.redisearch and self._embedder.dim == DIM:
            async with opened(self._embedder) as store:
                self._built("RediSearch HNSW", store.load_hnsw(LARGE, vectors), plain)
                for ef in EFS:
                    commands = knn("hnsw", queries, f"EF_RUNTIME {ef}")
                    self._searched("RediSearch HNSW", "raw", ef, store, commands)

    async def _measure_graph(self, store: Store, profile: HnswProfile) -> None:
        graphs, name, queries = Graphs(store.functions), f"HNSW {profile}", self._corpus.queries
        await graphs.drop(LARGE)
        store.settle()
        memory, started, redis_s = store.used_bytes, time.perf_counter(), store.redis_s("fcall")
        assert await graphs.build(LARGE, profile)
        cost = {"s": time.perf_counter() - started, "redis_s": store.redis_s("fcall") - redis_s}
        self._built(name, {**cost, "bytes": store.used_bytes - memory})
        graph = LARGE.graphs[int(store.redis.hget(LARGE.meta, "graph").split()[0])]
        for ef in EFS if profile == "production" else (PROFILES[profile].ef,):
            raw = [("VSIM", graph, "FP32", query.tobytes(), "COUNT", K, "EF", ef) for query in queries]
            self._searched(name, "raw", ef, store, raw)
            self._searched(name, "search", ef, store, await searches(store, LARGE, queries, ef))

    def _searched(self, index: str, via: str, ef: int | None, store: Store, commands: list[Command]) -> None:
        replies, timing = timed(store.redis, commands)
        if via == "search":  # nothing was cut off, and what answered is what the row names
            assert {reply[3] for reply in replies} == {b"HNSW:%d" % ef if ef else b""}
        places = np.array([[self._places[found] for found in found_ids(reply)] for reply in replies])
        cosines = np.take_along_axis(self._cosines, places, axis=1)
        row = {**self._what, "index": index, "via": via, "ef": ef}
        row["recall@10"] = round(float(np.mean(cosines >= self._tenth)), 4)
        row["recall@10_of_same"] = round(float(np.mean(cosines >= self._tenth - SAME)), 4)
        self._figures["rows"].append(row | timing)
        print(shown(row | timing), flush=True)

    def _built(self, index: str, cost: dict[str, float], plain: dict[str, float] | None = None) -> None:
        """Keep what an index cost; `plain`: the part of it that the hashes without an index cost."""
        count, size = self._what["memories"], cost["bytes"] - (plain["bytes"] if plain else 0)
        row = {"build_s": round(cost["s"], 2), "vectors_per_s": round(count / cost["s"])}
        row["redis_s"] = round(cost["redis_s"] - (plain["redis_s"] if plain else 0), 2)
        row |= {"mb": round(size / 1e6, 2), "gb_per_million": round(size / count / 1e3, 3)}
        self._figures["builds"].append({**self._what, "index": index, **row})
        print(f"{'':27}{index:22}" + "  ".join(f"{key} {value:,}" for key, value in row.items()), flush=True)


async def promotion(size: int) -> dict[str, Any]:
    """Return latencies of other users' searches before and while a large user gets a graph."""
    theirs, commands = gaussian(OTHERS * OTHERS_MEMORIES, DIM), []
    async with opened(DeterministicEmbedder(DIM)) as store:
        await store.load_indexed(LARGE, clustered(size, DIM))
        for number, vectors in enumerate(np.split(theirs.vectors, OTHERS)):
            await store.load_indexed(Owner(f"other{number}"), vectors)
            commands += await searches(store, Owner(f"other{number}"), theirs.queries[number, None])
        timed(store.redis, commands)
        ends = time.perf_counter() + OTHERS_BEFORE_S
        before = steady(store.redis, commands, lambda: time.perf_counter() > ends)
        # in a process of its own, so that it does not wait for the one that measures
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            building = pool.submit(build_graph, store.url)
            seen = steady(store.redis, commands, building.done)
        began, ended = building.result()
        during = [took_ms for due, took_ms in seen if began <= due <= ended]
        return {
            "memories": size,
            "others": f"{OTHERS} x {OTHERS_MEMORIES}, {OTHERS_PER_S}/s; bar: p99 < {OTHERS_BAR_MS} ms",
            "build_s": round(ended - began, 2),
            "before": percentiles([took_ms for _, took_ms in before]),
            "during": percentiles(during),
            "longest_ms": round(max(during), 1),
            "last_fork_ms": store.redis.info("stats")["latest_fork_usec"] / 1000,
        }


def build_graph(url: str) -> tuple[float, float]:
    """Build the graph of the large user; return when that began and ended."""

    async def build() -> tuple[float, float]:
        client, began = Client(Settings(), url), time.perf_counter()
        assert await Graphs(Functions(client)).build(LARGE, "production")
        ended = time.perf_counter()
        await client.close()
        return began, ended

    return asyncio.run(build())


def steady(redis: Redis, commands: list[Command], is_over: Callable[[], bool]) -> list[tuple[float, float]]:
    """Send commands at a fixed rate; return when each was due, and milliseconds from then to its reply."""
    seen, started = [], time.perf_counter()
    while not is_over():
        due = started + len(seen) / OTHERS_PER_S
        time.sleep(max(0.0, due - time.perf_counter()))
        redis.execute_command(*commands[len(seen) % len(commands)])
        seen.append((due, (time.perf_counter() - due) * 1000))
    return seen


def shown(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    what = f"{row['vectors']:10}{row['memories']:9,}{row['dim']:6}  {row['index']:22}{row['via']:8}"
    times = "".join(f"{row[name]:9.2f}" for name in ("p50", "p95", "p99"))
    return f"{what}{row['ef'] or '-':>4}{row['recall@10']:11.4f}{times}{row['per_s']:11,.0f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw recall against P95 latency of the product's searches, a line a size."""
    figure, groups = Figure(figsize=(10, 6.5), layout="constrained"), {}
    axes = figure.subplots()
    for row in rows:
        if row["via"] == "search" and row["index"] in ("FLAT", "HNSW production"):
            groups.setdefault(f"{row['memories']:,} x {row['dim']:,} {row['vectors']}", []).append(row)
    for number, (label, mine) in enumerate(groups.items()):
        exact, *graph = [(row["p95"], 100 - 100 * row["recall@10"], row["ef"]) for row in mine]
        xs, ys, efs = zip(*graph, strict=True)
        color = axes.plot(xs, ys, "o-", color=f"C{number}", label=label)[0].get_color()
        axes.plot(*exact[:2], "s", color=color, markersize=9, fillstyle="none")
        for x, y, ef in zip(xs, ys, efs, strict=True):
            axes.annotate(str(ef), (x, y), (3, -10), textcoords="offset points", fontsize=8, color=color)
    best = [(p95, 100 - 100 * recall) for _, recall, p95 in REFERENCE]
    axes.plot(*zip(*best, strict=True), "x--", color="grey", label="to beat: 1,000,000 x 1,536")
    axes.set(xscale="log", ylim=(12, -0.03), title="The graph at EF 64 to 512 (dots), exact search (squares)")
    axes.set_yscale("symlog", linthresh=0.1)  # of what is missed, upside down
    axes.set_yticks(MISSED, [f"{100 - missed:g}" for missed in MISSED])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="P95 latency of a semantic search in Redis, ms", ylabel=f"recall@{K} of a linear scan, %")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(title="memories x dimensions")
    figure.savefig(path, dpi=130)


async def run(plan: Plan, files: Sequence[Path]) -> dict[str, Any]:
    """Measure every size of the plan."""
    print(f"{'vectors':10}{'memories':>9}{'dim':>6}  {'index':22}{'via':8}{'EF':>4}{'recall@10':>11}", end="")
    print(f"{'P50 ms':>9}{'P95 ms':>9}{'P99 ms':>9}{'queries/s':>11}")
    figures: dict[str, Any] = {"reference": REFERENCE, "rows": [], "builds": []}
    for corpus in corpora(plan, await conversations(files) if files else None):
        await Bench(corpus, figures).run(plan)
    if plan.promoted:
        figures["promotion"] = await promotion(plan.promoted)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="conversations, one .json file each")
    parser.add_argument("--quick", action="store_true", help="1,000 and 5,000 memories")
    parser.add_argument("--sizes", type=int, nargs="+", help="of vectors of 384 dimensions, and nothing else")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json")) if arguments.folder else []
    if arguments.folder and not files:
        parser.error(f"no .json files in {arguments.folder}")
    plan = QUICK if arguments.quick else FULL
    if arguments.sizes:
        plan = replace(plan, sizes=tuple(arguments.sizes), wide_sizes=(), promoted=0)
    figures = asyncio.run(run(plan, files))
    for ef, recall, p95 in REFERENCE:
        print(f"{'to beat':10}1,000,000  1536  {'HNSW':30}{ef:4}{recall:11.4f}{'':9}{p95:9.2f}")
    print("others, while a user gets a graph:", figures.get("promotion"))
    name = "index" if plan == FULL else "index-part"  # a part must not pass for the whole
    path = write_result(name, figures, b"".join(file.read_bytes() for file in files))
    plot(figures["rows"], path.with_suffix(".png"))
    print(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
