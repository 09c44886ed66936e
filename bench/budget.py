"""Is a time budget met, and what does a search within one still find?

Cold searches over HTTP with `max_ms`, every text new, by size of the user and by searches a second (open
loop: a late search counts from when it was due). A budget is met when the reply is there at most 5 ms after
it. Overlap: the share of the top ten without a budget that is found.
Usage: python bench/budget.py [--quick]
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
from harness import Connection, percentiles, running_server, sentences, write_result
from harness import run as run_loop
from read_path import load

SEED = 11
SIZES = (1_000, 30_000)
BUDGETS_MS = (5, 10, 19, 50)
RATES_PER_S = (20, 60)
QUERIES = 300
WARM_UP = 30
#: of so many searches one is compared with the same without a budget
OVERLAP_EVERY = 5
QUERY_WORDS = (4, 8)
ALLOWED_MS = 5.0
#: memories from which the large user has a graph
THRESHOLD = 10_000


class Pool:
    """Connections of one server; a search takes a free one."""

    def __init__(self, url: str, user: str) -> None:
        self._url, self._path = url, f"/v1/users/{user}/search"
        self._free: list[Connection] = []

    async def search(self, **body: object) -> Any:
        """Return the reply of one search."""
        connection = self._free.pop() if self._free else Connection(self._url)
        status, raw = await connection.request("POST", self._path, body)
        self._free.append(connection)
        assert status == 200, raw
        return json.loads(raw)


async def measure(pool: Pool, budget_ms: int, rate: int, seed: int) -> dict[str, Any]:
    """Return how far replies were over their budget, and how they were cut."""
    texts = [f"budget of {text}" for text in sentences(WARM_UP + QUERIES, seed, QUERY_WORDS)]
    took: list[float] = []
    replies: dict[str, Any] = {}
    start = time.perf_counter() + 0.1

    async def one(number: int, text: str) -> None:
        due = start + number / rate
        await asyncio.sleep(due - time.perf_counter())
        reply = await pool.search(text=text, max_ms=budget_ms)
        if number >= WARM_UP:
            took.append((time.perf_counter() - due) * 1000)
            replies[text] = reply

    await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))
    overlaps = []
    for text in list(replies)[::OVERLAP_EVERY]:
        best = {hit["id"] for hit in (await pool.search(text=text))["memories"]}
        overlaps.append(len(best & {hit["id"] for hit in replies[text]["memories"]}) / max(1, len(best)))
    over = percentiles([max(0.0, took_ms - budget_ms) for took_ms in took])
    return {
        "took_ms": percentiles(took),
        "over_ms": over,
        "partial": round(sum(reply["partial"] for reply in replies.values()) / len(replies), 3),
        "overlap": round(sum(overlaps) / len(overlaps), 3),
        "met": over["p99"] <= ALLOWED_MS,
    }


async def run(url: str, *, quick: bool) -> dict[str, Any]:
    """Load the users, wait for the graph of the large one, and measure each budget."""
    http, figures = Connection(url), {}
    for size in SIZES[:1] if quick else SIZES:
        await load(http, f"user{size}", sentences(size, SEED))
        while size >= THRESHOLD:
            _, raw = await http.request(
                "POST", f"/v1/users/user{size}/search", {"text": "amber", "explain": True}
            )
            if json.loads(raw)["plan"]["index"] == "hnsw":
                break
            await asyncio.sleep(1)
        pool = Pool(url, f"user{size}")
        for rate in RATES_PER_S:
            for budget_ms in BUDGETS_MS:
                name = f"{size} memories, {rate}/s, max_ms {budget_ms}"
                figures[name] = await measure(pool, budget_ms, rate, SEED + size + 100 * rate + budget_ms)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small user only")
    arguments = parser.parse_args()
    with running_server(REDISMEM_HNSW_THRESHOLD=str(THRESHOLD), REDISMEM_MAINTAIN_EVERY_S="5") as server:
        figures = run_loop(run(server.url, quick=arguments.quick))
    print(f"{'':42}{'took p50/p95/p99':>24}{'over p50/p95/p99':>22}{'partial':>9}{'overlap':>9}  met")
    for name, row in figures.items():
        cells = [
            " / ".join(f"{row[part][p]:.1f}" for p in ("p50", "p95", "p99"))
            for part in ("took_ms", "over_ms")
        ]
        print(f"{name:42}{cells[0]:>24}{cells[1]:>22}{row['partial']:>9}{row['overlap']:>9}  {row['met']}")
    print(write_result("budget", {"redis": server.redis_info, "figures": figures}))


if __name__ == "__main__":
    main()
