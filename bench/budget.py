"""Is a time budget met, and what does a search within one still find?

Cold searches over HTTP with `max_ms`, every text new, by size of the user and by number of clients. A budget is
met when the reply is there at most 5 ms after it. Overlap: the share of the unbudgeted top ten that is found.
Usage: python bench/budget.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Connection, percentiles, running_server, sentences, write_result
from harness import run as run_loop
from read_path import load

SEED = 11
SIZES = (1_000, 30_000)
BUDGETS_MS = (5, 10, 19, 50)
CLIENTS = (1, 8)
QUERIES = 300
WARM_UP = 30
QUERY_WORDS = (4, 8)
ALLOWED_MS = 5.0
#: memories from which the large user has a graph
THRESHOLD = 10_000


async def searched(url: str, user: str, body: dict[str, Any]) -> tuple[float, int, Any]:
    """Return milliseconds, status and reply of one search on a connection of its own turn."""
    connection = _pool.pop() if _pool else Connection(url)
    started = time.perf_counter()
    status, raw = await connection.request("POST", f"/v1/users/{user}/search", body)
    took_ms = (time.perf_counter() - started) * 1000
    _pool.append(connection)
    return took_ms, status, json.loads(raw)


_pool: list[Connection] = []


async def measure(url: str, user: str, budget_ms: int, clients: int, seed: int) -> dict[str, Any]:
    """Return how far replies were over their budget, and how they were cut."""
    texts = iter(sentences(WARM_UP + QUERIES, seed, QUERY_WORDS))
    over: list[float] = []
    took: list[float] = []
    seen: Counter[str] = Counter()
    overlaps: list[float] = []

    async def client() -> None:
        for number, text in enumerate(texts):
            body = {"text": f"budget of {text}", "max_ms": budget_ms}
            took_ms, status, reply = await searched(url, user, body)
            assert status == 200, reply
            took.append(took_ms)
            over.append(max(0.0, took_ms - budget_ms))
            seen["partial" if reply["partial"] else "whole"] += 1
            if clients == 1 and number % 5 == 0:
                _, _, whole = await searched(url, user, {"text": f"budget of {text}"})
                best = {hit["id"] for hit in whole["memories"]}
                overlaps.append(len(best & {hit["id"] for hit in reply["memories"]}) / max(1, len(best)))

    await asyncio.gather(*(client() for _ in range(clients)))
    figures: dict[str, Any] = {
        "took_ms": percentiles(took[WARM_UP:]),
        "over_ms": percentiles(over[WARM_UP:]),
        "partial": round(seen["partial"] / sum(seen.values()), 3),
        "met": percentiles(over[WARM_UP:])["p99"] <= ALLOWED_MS,
    }
    if overlaps:
        figures["overlap"] = round(sum(overlaps) / len(overlaps), 3)
    return figures


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
        for clients in CLIENTS:
            for budget_ms in BUDGETS_MS:
                name = f"{size} memories, {clients} clients, max_ms {budget_ms}"
                seed = SEED + size + 100 * clients + budget_ms
                figures[name] = await measure(url, f"user{size}", budget_ms, clients, seed)
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
        print(
            f"{name:42}{cells[0]:>24}{cells[1]:>22}{row['partial']:>9}{row.get('overlap', ''):>9}  {row['met']}"
        )
    print(write_result("budget", {"redis": server.redis_info, "figures": figures}))


if __name__ == "__main__":
    main()
