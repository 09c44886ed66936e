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
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import harness
from index import conversations
from recall import turns
from recovery import opened
from workerjobs import measure_conversations, measure_drain, measure_sizes
from workerreads import measure_profile, measure_reads, measure_topics
from workerstage import NEVER, Bench, Figures, Ready, Talk

from redismem.embed import open_embedder
from redismem.keys import JOBS_DEAD, STORE
from redismem.service import assembled
from redismem.settings import Settings
from redismem.store import claim

PARTS = ("conversations", "sizes", "drain", "reads", "profile", "topics")


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
