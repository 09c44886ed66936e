"""How much of the evidence comes back? Evidence recall@k on conversations in LoCoMo's format, over HTTP.

One conversation is one user, one turn one memory; a question counts the share of its evidence turns among
the first k memories. The public data set: github.com/snap-research/locomo (data/locomo10.json, one file a
conversation here). Usage: python bench/recall.py FOLDER [--limit-questions N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from harness import running_server, write_result

KS = (5, 10, 20)
MODES = ("hybrid", "semantic", "keyword")
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop"}
BATCH_MEMORIES = 200
BATCH_QUERIES = 25


def turns(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the memories of a conversation in order; ids are the turns' dia_ids."""
    memories = []
    count = len([name for name in conversation if re.fullmatch(r"session_\d+", name)])
    for number in range(1, count + 1):
        when = datetime.strptime(conversation[f"session_{number}_date_time"], "%I:%M %p on %d %B, %Y")
        for turn in conversation[f"session_{number}"]:
            caption = f" [image: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            memories.append(
                {
                    "id": turn["dia_id"],
                    "text": f"{turn['speaker']}: {turn['text']}{caption}",
                    "memory_type": "message",
                    "session_id": f"session_{number}",
                    "event_date": when.replace(tzinfo=UTC).isoformat(),
                }
            )
    return memories


def questions(document: dict[str, Any]) -> list[tuple[str, set[str], int]]:
    """Return (question, evidence ids, category) of categories 1 to 4 that have evidence."""
    found = []
    for item in document["qa"]:
        evidence = set(re.findall(r"D\d+:\d+", " ".join(item.get("evidence") or [])))
        if item["category"] in CATEGORIES and evidence:
            found.append((item["question"], evidence, item["category"]))
    return found


async def load(http: httpx.AsyncClient, user: str, memories: list[dict[str, Any]]) -> None:
    """Store a conversation through the API."""
    for first in range(0, len(memories), BATCH_MEMORIES):
        batch = {"memories": memories[first : first + BATCH_MEMORIES]}
        reply = await http.post(f"/v1/users/{user}/memories", json=batch)
        reply.raise_for_status()
        assert all(item["outcome"] == "CREATED" for item in reply.json()["memories"])


async def ask(http: httpx.AsyncClient, user: str, texts: list[str], mode: str, limit: int) -> list[list[str]]:
    """Return the ids found for each text, best first."""
    found = []
    for first in range(0, len(texts), BATCH_QUERIES):
        part = texts[first : first + BATCH_QUERIES]
        queries = [{"text": text, "limit": limit, "search_mode": mode} for text in part]
        reply = await http.post(f"/v1/users/{user}/search/batch", json={"queries": queries})
        reply.raise_for_status()
        found += [[hit["id"] for hit in result["memories"]] for result in reply.json()["results"]]
    return found


async def measure(url: str, folder: Path, limit_questions: int | None) -> dict[str, Any]:
    """Return recall@k, MRR, and recall@10 by category and conversation, for each mode."""
    scores: dict[str, dict[str, list[float]]] = {mode: defaultdict(list) for mode in MODES}
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for path in sorted(folder.glob("*.json")):
            document = json.loads(path.read_text())
            await load(http, path.stem, turns(document["conversation"]))
            asked = questions(document)[:limit_questions]
            for mode in MODES:
                # k decides how many candidates are fused, so each k is asked for itself
                for k in KS:
                    found = await ask(http, path.stem, [text for text, _, _ in asked], mode, k)
                    for (_, evidence, category), ids in zip(asked, found, strict=True):
                        share = len(evidence & set(ids)) / len(evidence)
                        scores[mode][f"recall@{k}"].append(share)
                        if k == 10:
                            scores[mode][CATEGORIES[category]].append(share)
                            scores[mode][path.stem].append(share)
                        if k == max(KS):
                            rank = next((i for i, one in enumerate(ids, 1) if one in evidence), None)
                            scores[mode]["mrr"].append(1 / rank if rank else 0.0)
    return {
        mode: {name: round(sum(values) / len(values), 4) for name, values in by.items()}
        | {"n": len(by["mrr"])}
        for mode, by in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit-questions", type=int, help="of each conversation, for a quick look")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        raise SystemExit(f"no .json files in {arguments.folder}")
    with running_server() as server:
        figures = asyncio.run(measure(server.url, arguments.folder, arguments.limit_questions))
    rows = list(next(iter(figures.values())))
    print(f"{'':14}" + "".join(f"{mode:>10}" for mode in MODES))
    for row in rows:
        print(f"{row:14}" + "".join(f"{figures[mode][row]:10}" for mode in MODES))
    data = b"".join(path.read_bytes() for path in files)
    print(write_result("recall", {"redis": server.redis_info, "figures": figures}, data))


if __name__ == "__main__":
    main()
