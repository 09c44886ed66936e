"""How much memory does Redis use for a user, and for a memory of theirs?

Users with one memory each, then more memories for some of them; INFO's used_memory before, between and after.
The embedder's vectors carry no meaning, but are as long as those of the bundled model.
Usage: python bench/sizing.py
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import sentences, write_result

from redismem.embedded import EmbeddedRedis
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.types import MemoryInput

SEED = 3
USERS = 400
LARGE, MEMORIES, BATCH = 20, 500, 100
#: graphs are another matter (bench/index.py), summaries and topics are the worker's
EMBEDDER = "deterministic"


async def used_bytes(service: Service) -> int:
    lines = (await service.client.execute("INFO", "memory")).decode().splitlines()
    return next(int(line.partition(":")[2]) for line in lines if line.startswith("used_memory:"))


async def measured(service: Service) -> dict[str, object]:
    texts = sentences(USERS + LARGE * MEMORIES, SEED)
    # what the first user brings along is not each one's
    await service.writer.put(service.owner("first"), [MemoryInput(text=texts[0])])
    before = await used_bytes(service)
    for number in range(USERS):
        await service.writer.put(service.owner(f"u{number}"), [MemoryInput(text=texts[number])])
    between = await used_bytes(service)
    left = iter(texts[USERS:])
    for number in range(LARGE):
        for _ in range(MEMORIES // BATCH):
            batch = [MemoryInput(text=next(left)) for _ in range(BATCH)]
            await service.writer.put(service.owner(f"u{number}"), batch)
    after = await used_bytes(service)
    return {
        "users": USERS,
        "bytes_per_user_with_one_memory": round((between - before) / USERS),
        "memories": LARGE * MEMORIES,
        "bytes_per_further_memory": round((after - between) / (LARGE * MEMORIES)),
        "text_bytes": round(sum(map(len, texts)) / len(texts)),
        "dim": service.embedder.dim,
    }


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        async with EmbeddedRedis(Path(folder), persist=False) as redis:
            settings = Settings(redis_url=redis.url, embedder=EMBEDDER, testing=True)
            async with open_service(settings) as service:
                figures = await measured(service)
    print(json.dumps(figures, indent=1))
    print(write_result("sizing", {"figures": figures}))


asyncio.run(main())
