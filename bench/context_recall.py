"""How much of the evidence is inside a context? Beside plain top-k at the same token count, over HTTP.

One conversation in LoCoMo's format is one user, one turn one memory, and the worker has made profiles and
topics. A question counts the share of its evidence turns among the memories of its context. Plain top-k is a
search rendered in the same lines, as many hits as fit into the same tokens; `limit` is what fits on average.
The public data set: github.com/snap-research/locomo. Usage: python bench/context_recall.py FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from harness import running_server, write_result
from recall import CATEGORIES, load, questions, turns

from redismem.conversation import ContextMemory
from redismem.embed import Embedder, open_embedder
from redismem.rendering import memory_line
from redismem.settings import Settings

#: tokens, stages, and the limit of the plain search
CONTEXTS = ((1_200, 4, 40), (2_000, 3, 60), (4_000, 4, 100))
LANES = 4
#: seconds until the worker must have made topics and a profile
SETTLE_S = 300


async def settled(http: httpx.AsyncClient, user: str) -> None:
    """Wait until the worker has made a user's topics and profile, and nothing is due."""
    for _ in range(SETTLE_S):
        topics = (await http.get(f"/v1/users/{user}/topics")).json()["topics"]
        profile = (await http.get(f"/v1/users/{user}/profile")).json()
        jobs = (await http.get("/v1/stats")).json()["jobs"]
        if topics and profile["compiled_at"] and not jobs["due"] and not jobs["started"]:
            return
        await asyncio.sleep(1)
    raise SystemExit("the worker is too slow")


def plain(hits: list[dict[str, Any]], tokens: int, embedder: Embedder) -> set[str]:
    """Return the ids of as many hits as fit, rendered as a context renders them."""
    lines = []
    for hit in hits:
        at = datetime.fromisoformat(hit.get("event_date") or hit["created_at"])
        lines.append(memory_line(ContextMemory(id=hit["id"], text=hit["text"], at=at)))
    found, left = set(), tokens
    for hit, count in zip(hits, embedder.count_tokens(lines), strict=True):
        left -= count
        if left < 0:
            break
        found.add(hit["id"])
    return found


async def measure(url: str, folder: Path) -> dict[str, Any]:
    """Return shares of evidence by tokens, for contexts and plain top-k, and how many memories they hold."""
    embedder = await open_embedder(Settings.from_environment())
    shares: dict[str, list[float]] = defaultdict(list)
    over = 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for path in sorted(folder.glob("*.json")):
            document = json.loads(path.read_text())
            await load(http, path.stem, turns(document["conversation"]))
            await settled(http, path.stem)
            asked = iter(questions(document))

            async def lane(user: str, todo: Any = asked) -> None:
                nonlocal over
                for text, evidence, category in todo:
                    for tokens, stages, limit in CONTEXTS:
                        body = {"text": text, "stages": stages, "max_tokens": tokens}
                        context = (await http.post(f"/v1/users/{user}/context", json=body)).json()
                        query = {"text": text, "limit": limit}
                        hits = (await http.post(f"/v1/users/{user}/search", json=query)).json()["memories"]
                        blocks = [block for stage in context["stages"] for block in stage["blocks"]]
                        inside = {one["id"] for block in blocks for one in block.get("memories", ())}
                        by_search = plain(hits, tokens, embedder)
                        over += embedder.count_tokens([context["text"]])[0] > tokens
                        for name, ids in (("context", inside), ("plain", by_search)):
                            share = len(evidence & ids) / len(evidence)
                            shares[f"{name} {tokens}"].append(share)
                            shares[f"{name} {tokens} {CATEGORIES[category]}"].append(share)
                            shares[f"{name} {tokens} memories"].append(len(ids))
                        shares[f"stage 1 of {tokens}, tokens"].append(context["stages"][0]["tokens"])

            await asyncio.gather(*(lane(path.stem) for _ in range(LANES)))
    await embedder.close()
    means = {name: round(sum(values) / len(values), 4) for name, values in sorted(shares.items())}
    return {"n": len(shares[f"plain {CONTEXTS[0][0]}"]), "over_budget": over, **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        raise SystemExit(f"no .json files in {arguments.folder}")
    with running_server() as server:
        figures = asyncio.run(measure(server.url, arguments.folder))
    for name, value in figures.items():
        print(f"{name:40}{value:10}")
    data = b"".join(path.read_bytes() for path in files)
    print(write_result("context_recall", {"redis": server.redis_info, "figures": figures}, data))


if __name__ == "__main__":
    main()
