"""How fast are contexts while 20 conversations go on, and what does prefetching change?

Conversations in LoCoMo's format are replayed: each user has all sessions but the last ones as memories, which
are then said turn by turn over HTTP, each message of the first speaker followed by its context as events sent
by the server. Once without and once with prefetching, other sessions of the same conversations; beside it
searches of others at a steady rate (open loop: a late one counts from when it was due). Before that single
requests one by one: each part alone, and all of them. Usage: python bench/context.py FOLDER [--seconds 60]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from context_recall import SETTLE_S, settled
from harness import Connection, empty_endpoint, percentiles, run, running_server, write_result
from recall import load, questions, turns

from redismem.conversation import STAGE_TOKENS, ContextParts
from redismem.embed import Embedder, open_embedder
from redismem.embedded import EmbeddedRedis
from redismem.settings import Settings

SESSIONS = 20
#: sessions of each conversation that are replayed in each of the two runs; those before are memories
REPLAYED = 4
#: memories of each user: the turns before those that are replayed
MEMORIES = 200
#: seconds between the turns of one conversation
PAUSE_S = (2.0, 6.0)
#: searches a second of others
OTHERS_PER_S = 10
SEED = 7
#: requests for each part alone
SINGLE = 120
PARTS = tuple(ContextParts.__struct_fields__)


@dataclass
class Seen:
    """Milliseconds by what was waited for, and what was wrong. `embedder` counts tokens."""

    embedder: Embedder
    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    contexts: int = 0
    over_budget: int = 0
    errors: int = 0


class Stream:
    """A keep-alive connection that reads server-sent events with their moments."""

    def __init__(self, url: str) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def events(self, path: str, body: object) -> AsyncIterator[tuple[str, bytes]]:
        """Yield name and data of each event of one request."""
        if self._reader.at_eof():  # idle ones are closed by the server
            await self.__aenter__()
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        head += f"Accept: text/event-stream\r\nContent-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        status = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.partition(b"\r\n")[0]:
            raise SystemExit(status.decode())
        waiting = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            waiting += await self._reader.readexactly(size)
            await self._reader.readexactly(2)
            while b"\n\n" in waiting:
                event, _, waiting = waiting.partition(b"\n\n")
                name, _, data = event.partition(b"\n")
                yield name.removeprefix(b"event: ").decode(), data.removeprefix(b"data: ")
        await self._reader.readexactly(2)


def parted(document: dict[str, Any]) -> tuple[list[dict[str, Any]], ...]:
    """Return the turns that are memories, and those that are replayed in the first and the second run."""
    said = turns(document["conversation"])
    names = list(dict.fromkeys(turn["session_id"] for turn in said))
    parts = names[: -2 * REPLAYED], names[-2 * REPLAYED : -REPLAYED], names[-REPLAYED:]
    memories, *replays = ([turn for turn in said if turn["session_id"] in part] for part in parts)
    return (memories[-MEMORIES:], *replays)


def users(files: list[Path]) -> list[tuple[str, Path]]:
    """Return names of users and whose conversation is theirs."""
    return [
        (f"{files[number % len(files)].stem}-{number}", files[number % len(files)])
        for number in range(SESSIONS)
    ]


async def fill(url: str, files: list[Path]) -> None:
    """Store the memories of all users, and let the worker make what it makes of them."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for user, path in users(files):
            await load(http, user, parted(json.loads(path.read_text()))[0])
        for user, _ in users(files):
            await settled(http, user)


async def rested(url: str) -> None:
    """Wait until the worker has nothing to do."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for _ in range(SETTLE_S):
            if not (await http.get("/v1/stats")).json()["jobs"]["due"]:
                break
            await asyncio.sleep(1)


async def talk(url: str, user: str, said: list[dict[str, Any]], ends_s: float, seen: Seen, seed: int) -> None:
    """Replay turns in a session; of the first speaker's each has a context."""
    chooser = random.Random(seed)
    http = Connection(url)
    speaker = said[0]["text"].partition(":")[0]
    async with Stream(url) as stream:
        status, _ = await http.request("POST", f"/v1/users/{user}/sessions", {"id": f"talk-{seed}"})
        seen.errors += status != 201
        for turn in said:
            await asyncio.sleep(chooser.uniform(*PAUSE_S))
            if time.perf_counter() > ends_s:
                break
            is_asking = turn["text"].startswith(speaker)
            message = {"text": turn["text"], "role": "user" if is_asking else "assistant"}
            began_s = time.perf_counter()
            path = f"/v1/users/{user}/sessions/talk-{seed}/messages"
            status, _ = await http.request("POST", path, message)
            seen.errors += status != 201
            seen.ms["message"].append((time.perf_counter() - began_s) * 1000)
            if not is_asking:
                continue
            body = {"session_id": f"talk-{seed}", "text": turn["text"], "stages": 4}
            began_s = time.perf_counter()
            async for name, data in stream.events(f"/v1/users/{user}/context", body):
                took_ms = (time.perf_counter() - began_s) * 1000
                event = json.loads(data)
                if name == "stage":
                    seen.ms[f"stage {event['stage']}"].append(took_ms)
                    seen.over_budget += event["tokens"] > STAGE_TOKENS[event["stage"]]
                elif name == "done":
                    seen.ms["whole"].append(took_ms)
                    seen.contexts += 1
                    seen.over_budget += seen.embedder.count_tokens([event["text"]])[0] > STAGE_TOKENS[4]
                else:
                    seen.errors += 1
        await http.request("DELETE", f"/v1/users/{user}/sessions/talk-{seed}")
    http.close()


async def others(url: str, users: list[str], texts: list[str], ends_s: float, seen: Seen) -> None:
    """Search at a steady rate; a late answer counts from when its request was due."""
    chooser, tasks = random.Random(SEED), set()
    http = httpx.AsyncClient(base_url=url, timeout=30)

    async def search(due_s: float, number: int) -> None:
        body = {"text": f"{chooser.choice(texts)} {number}"}
        reply = await http.post(f"/v1/users/{chooser.choice(users)}/search", json=body)
        seen.errors += reply.status_code != 200
        seen.ms["others"].append((time.perf_counter() - due_s) * 1000)

    due_s, number = time.perf_counter(), 0
    while due_s < ends_s:
        await asyncio.sleep(due_s - time.perf_counter())
        tasks.add(asyncio.create_task(search(due_s, number)))
        due_s, number = due_s + 1 / OTHERS_PER_S, number + 1
    await asyncio.gather(*tasks)
    await http.aclose()


async def replay(url: str, files: list[Path], run: int, seconds: float, embedder: Embedder) -> dict[str, Any]:
    """Return what 20 conversations waited for, and what prefetching did."""
    seen, documents = Seen(embedder), {path: json.loads(path.read_text()) for path in files}
    texts = [text for document in documents.values() for text, _, _ in questions(document)]
    ends_s = time.perf_counter() + seconds
    await asyncio.gather(
        *(
            # each copy begins elsewhere in the same conversation
            talk(url, user, parted(documents[path])[run][number * 7 % 40 :], ends_s, seen, 100 * run + number)
            for number, (user, path) in enumerate(users(files))
        ),
        others(url, [user for user, _ in users(files)], texts, ends_s, seen),
    )
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        stats = (await http.get("/v1/stats")).json()
    counts = stats["contexts"]
    figures: dict[str, Any] = {name: percentiles(ms) for name, ms in sorted(seen.ms.items())}
    return {
        **figures,
        "contexts": seen.contexts,
        "over_budget": seen.over_budget,
        "errors": seen.errors,
        "at_hand": round(counts.get("stage 2 memories at hand", 0) / max(1, counts["stage 2 memories"]), 4),
        "counts": counts,
        "prefetch": {
            signal: {**did, "precision": round(did.get("used", 0) / max(1, did.get("issued", 0)), 4)}
            for signal, did in stats["prefetch"].items()
        },
    }


async def single(url: str, path: Path) -> dict[str, Any]:
    """Return what each part takes alone and all of them together, one request after another."""
    document = json.loads(path.read_text())
    asked = [text for text, _, _ in questions(document)]
    times: dict[str, list[float]] = defaultdict(list)
    http, floor = Connection(url), list[float]()
    configurations: dict[str, dict[str, Any]] = {
        part: {"stages": 3, "parts": {other: other == part for other in PARTS}} for part in PARTS
    }
    for part in ("deep", "history", "related"):
        configurations.pop(part)
    configurations |= {"all of 3 stages": {"stages": 3}, "all of 4 stages": {"stages": 4}}
    plain = f"/v1/users/{path.stem}-0/search"
    with empty_endpoint(10) as empty:
        nothing = Connection(empty)
        for number in range(SINGLE):
            for name, options in configurations.items():
                body = {"text": f"{asked[number % len(asked)]} {number} {name}", **options}
                began_s = time.perf_counter()
                status, _ = await http.request("POST", f"/v1/users/{path.stem}-0/context", body)
                times[name].append((time.perf_counter() - began_s) * 1000)
                assert status == 200
            began_s = time.perf_counter()
            await http.request("POST", plain, {"text": f"{asked[number % len(asked)]} {number} plain"})
            times["plain search"].append((time.perf_counter() - began_s) * 1000)
            began_s = time.perf_counter()
            await nothing.request("POST", "/", {})
            floor.append((time.perf_counter() - began_s) * 1000)
        nothing.close()
    http.close()
    figures: dict[str, Any] = {name: percentiles(ms) for name, ms in times.items()}
    slowest = max((name for name in PARTS if name in figures), key=lambda name: figures[name]["p50"])
    ratio = figures["all of 3 stages"]["p50"] / figures[slowest]["p50"]
    return {**figures, "empty endpoint": percentiles(floor), "slowest": slowest, "ratio": round(ratio, 3)}


async def measure(arguments: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """Return the figures of all runs; they are made on one store."""
    embedder = await open_embedder(Settings.from_environment())
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        async with EmbeddedRedis(Path(folder)) as redis:
            with running_server(REDISMEM_REDIS_URL=redis.url) as server:
                await fill(server.url, files)
                figures["one by one"] = await single(server.url, files[0])
                figures["redis"] = server.redis_info
            for run, (name, signals) in enumerate(
                (("without", {"REDISMEM_PREFETCH": ""}), ("with prefetching", {})), 1
            ):
                with running_server(REDISMEM_REDIS_URL=redis.url, **signals) as server:
                    await rested(server.url)
                    figures[name] = await replay(server.url, files, run, arguments.seconds, embedder)
    figures["others_p95_ratio"] = round(
        figures["with prefetching"]["others"]["p95"] / figures["without"]["others"]["p95"], 3
    )
    await embedder.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        raise SystemExit(f"no .json files in {arguments.folder}")
    figures = run(measure(arguments, files))
    for name, value in figures.items():
        print(name, json.dumps(value, indent=1) if isinstance(value, dict) else value)
    data = b"".join(path.read_bytes() for path in files)
    print(write_result("context", {"figures": figures}, data))


if __name__ == "__main__":
    main()
