"""What do clients see, and what is lost, when something breaks under load?

A steady open-loop load of searches and new memories runs before, while and after: `kill -9` of a serving
process (of two; the other goes on), `kill -9` of Redis (started again after 2 s, append-only file fsynced
every second), a full disk under that file (a small tmpfs of our own; needs root), and maxmemory reached.
Told are errors by second, the messages that clients got, the seconds from the end of the fault to the first
good answer and to the last bad one, and whether every write acknowledged with 2xx is there afterwards.
Usage: python bench/faults.py [--only process redis disk memory] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redis import Redis

sys.path.insert(0, str(Path(__file__).parent))
from harness import Connection, Server, processes, request_bytes, run, running_server, sentences, write_result
from loadfigures import figures
from openloop import NO_REPLY, Due, OpenLoop, Phase, arrivals

from redismem.embedded import EmbeddedRedis

Figures = dict[str, Any]

SEED = 43
FAULTS = ("process", "redis", "disk", "memory")
#: requests a second, and the share of them that store a memory
PER_S, WRITES = 50.0, 0.4
#: seconds before a fault, while it lasts, and of the whole load
BEFORE_S, AWAY_S, WHOLE_S = 4.0, {"process": 0.0, "redis": 2.0, "disk": 5.0, "memory": 4.0}, 18.0
#: writes acknowledged so long before a kill of Redis may be lost: appendfsync everysec
FSYNC_S = 1.0
PEOPLE, MEMORIES = 10, 20
QUERIES = 40
DISK_MB = 64
#: bytes above what is used that Redis may still take; a memory takes about 4,000 with its index
ROOM_BYTES = 64 * 1024
#: seconds after the load until every read must be answered again
PATIENCE_S = 20.0
#: connections whose searches warm up both processes
WARM = 8


@dataclass
class Seen:
    """What clients were told: acknowledged paths with their moments, bad answers with their words."""

    #: of each memory that was to be stored, by its id
    paths: dict[str, str] = field(default_factory=dict)
    acknowledged: dict[str, float] = field(default_factory=dict)
    answers: list[tuple[float, str, bool]] = field(default_factory=list)
    messages: Counter[tuple[str, int, str, str]] = field(default_factory=Counter)

    def saw(self, due: Due, status: int, done_s: float, reply: bytes) -> None:
        """Count a request that ended."""
        is_good, told = 200 <= status < 300, {}
        with suppress(ValueError):
            told = json.loads(reply.partition(b"\r\n\r\n")[2])
        if is_good and due.name == "write":
            item = told["memories"][0]
            is_good = "error" not in item
            if is_good:
                self.acknowledged[self.paths[item["id"]]] = done_s
        self.answers.append((done_s, due.name, is_good))
        if not is_good:
            error = told.get("error", {})
            message = error.get("message", "") or NO_REPLY.get(status, "")
            self.messages[due.name, status if status >= 100 else 0, error.get("code", ""), message] += 1


@dataclass
class Stage:
    """What a fault can take hold of: the service, and its Redis as long as it runs."""

    server: Server
    data_dir: Path
    redis: EmbeddedRedis

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        with Redis.from_url(self.redis.url, socket_timeout=5) as client:
            yield client

    async def restart_redis(self) -> None:
        """Start Redis on the same files."""
        await self.redis.__aexit__()
        await self.redis.__aenter__()


def requests(chooser: random.Random, paths: dict[str, str]) -> Iterator[Due]:
    """Yield searches of a few texts, and new memories with ids of their own, whose paths are noted."""
    texts = sentences(QUERIES, SEED, (4, 8))
    for number, at_s in enumerate(arrivals([Phase("faults", 1, WHOLE_S)], PER_S, chooser)):
        user = f"/v1/users/fault{chooser.randrange(PEOPLE)}"
        if chooser.random() < WRITES:
            body = {"id": f"w{number}", "text": f"{chooser.choice(texts)} and {number}"}
            paths[f"w{number}"] = f"{user}/memories/w{number}"
            yield Due(at_s, "write", request_bytes("POST", f"{user}/memories", body))
        else:
            body = {"text": f"{chooser.choice(texts)} {chooser.choice(('', number))}"}
            yield Due(at_s, "search", request_bytes("POST", f"{user}/search", body))


# the faults: each begins, waits as long as it lasts, and ends


async def kill_process(stage: Stage, _: float) -> None:
    """Kill the process that holds most connections of clients; its parent starts another."""
    os.kill(serving(stage.server), signal.SIGKILL)


async def kill_redis(stage: Stage, away_s: float) -> None:
    """Kill Redis; start it again on its files."""
    assert stage.redis.pid
    os.kill(stage.redis.pid, signal.SIGKILL)
    await asyncio.sleep(away_s)
    await stage.restart_redis()


async def fill_disk(stage: Stage, away_s: float) -> None:
    """Fill the disk of the append-only file up to its last byte; make room again."""
    ballast = stage.data_dir.parent / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(65_536)):
            pass
    await asyncio.sleep(away_s)
    ballast.unlink()


async def fill_memory(stage: Stage, away_s: float) -> None:
    """Set maxmemory just above what is used, without eviction; lift it again."""
    async with stage.client() as redis:
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("maxmemory", redis.info("memory")["used_memory"] + ROOM_BYTES)
        await asyncio.sleep(away_s)
        redis.config_set("maxmemory", 0)


Break = Callable[[Stage, float], Awaitable[None]]
BREAKS: dict[str, Break] = {
    "process": kill_process,
    "redis": kill_redis,
    "disk": fill_disk,
    "memory": fill_memory,
}


def serving(server: Server) -> int:
    """Return the child of the service with the most established connections on its port."""
    port = f":{urlsplit(server.url).port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[1].endswith(port) and row[3] == "01"}
    counts = Counter[int]()
    for pid in processes(server.pid)[1:]:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                counts[pid] += str(link.readlink()).removeprefix("socket:[").removesuffix("]") in inodes
    pid, connections = counts.most_common(1)[0]
    assert connections, "no process has connections"
    return pid


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """Yield a directory with a small file system of its own; None if it may not be made."""
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


async def prepare(server: Server) -> None:
    """Store what is searched, and let both processes load what they load at first use."""
    http = Connection(server.url)
    for person in range(PEOPLE):
        batch = [{"text": text} for text in sentences(MEMORIES, SEED + person)]
        status, reply = await http.request("POST", f"/v1/users/fault{person}/memories", {"memories": batch})
        assert status == 201, reply
    http.close()
    warm = [Connection(server.url) for _ in range(WARM)]
    for number, one in enumerate(warm):
        await one.request("POST", f"/v1/users/fault{number}/search", {"text": f"warm up {number}"})
        one.close()


async def missing(server: Server, paths: list[str]) -> list[str]:
    """Return the paths of memories that are not there."""
    http, found = Connection(server.url), list[str]()
    deadline = time.monotonic() + PATIENCE_S
    for path in paths:
        while True:
            status, reply = 0, b""
            with suppress(OSError, asyncio.IncompleteReadError):
                status, reply = await http.request("GET", path)
            if status in (200, 404):
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"it does not answer again: {status} {reply.decode()}")
            await asyncio.sleep(0.1)
        if status == 404:
            found.append(path)
    http.close()
    return found


async def broken(name: str, stage: Stage) -> Figures:
    """Run the load with one fault; return what became of it."""
    await prepare(stage.server)
    seen = Seen()
    load = OpenLoop(stage.server.url, seen=seen.saw)
    running = asyncio.create_task(load.run(requests(random.Random(SEED), seen.paths)))
    await asyncio.sleep(BEFORE_S)
    began_s = load.now_s()
    await BREAKS[name](stage, AWAY_S[name])
    ended_s = load.now_s()
    records = await running
    lost = await missing(stage.server, list(seen.acknowledged))
    # only a kill of Redis may lose what was not fsynced
    open_s = began_s - FSYNC_S if name == "redis" else began_s
    window = {path for path, at_s in seen.acknowledged.items() if open_s <= at_s < began_s}
    return {
        "began_s": round(began_s, 2),
        "ended_s": round(ended_s, 2),
        "operations": figures(records.table(), WHOLE_S, {}),
        "after_the_end": {kind: after(seen, kind, ended_s) for kind in ("search", "write")},
        "bad_before": sum(not is_good for at_s, _, is_good in seen.answers if at_s < began_s),
        "by_second": by_second(seen),
        "messages": [
            {"operation": kind, "status": status, "code": code, "message": message, "times": times}
            for (kind, status, code, message), times in seen.messages.most_common()
        ],
        "writes": {
            "acknowledged": len(seen.acknowledged),
            "in_fsync_window": len(window),
            "lost_in_fsync_window": len(window.intersection(lost)),
            "lost": len(set(lost) - window),
        },
    }


def after(seen: Seen, kind: str, ended_s: float) -> dict[str, float | None]:
    """Return the seconds from the end of a fault to the first good answer, and to the last bad one."""
    since = [(at_s - ended_s, is_good) for at_s, name, is_good in seen.answers if name == kind]
    good = [at_s for at_s, is_good in since if is_good and at_s > 0]
    bad = [at_s for at_s, is_good in since if not is_good]
    return {
        "first_good_s": round(min(good), 3) if good else None,
        "last_bad_s": round(max([0.0, *bad]), 3) if bad else None,
    }


def by_second(seen: Seen) -> list[dict[str, int]]:
    """Return good and bad answers by the second in which they came."""
    rows: dict[int, Counter[str]] = defaultdict(Counter)
    for at_s, name, is_good in seen.answers:
        rows[int(at_s)][f"{name} {'good' if is_good else 'bad'}"] += 1
    return [{"second": second, **rows[second]} for second in sorted(rows)]


async def staged(name: str, folder: Path) -> Figures:
    """Start a Redis of our own and a service of two processes on it; break it."""
    async with EmbeddedRedis(folder / "data") as redis:
        with running_server(REDISMEM_REDIS_URL=redis.url, REDISMEM_WORKERS="2") as server:
            return {**await broken(name, Stage(server, folder / "data", redis)), "redis": server.redis_info}


def show(name: str, told: Figures) -> None:
    """Print what a reader looks for first."""
    writes, span = told["writes"], told["ended_s"] - told["began_s"]
    print(f"{name}: lasted {span:.1f} s; bad answers before it {told['bad_before']}")
    for kind, row in told["after_the_end"].items():
        first, last = row["first_good_s"], row["last_bad_s"]
        print(f"  {kind:8} first good answer {first} s, last bad one {last} s after it")
    print(f"  writes   {json.dumps(writes)}")
    for row in told["messages"]:
        print(f"  {row['times']:5} x {row['operation']:6} {row['status']} {row['code']} {row['message']}")


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--out", type=Path, help="JSON; bench/results/faults.json unless given")
    arguments = parser.parse_args()
    found: dict[str, Figures] = {}
    for name in arguments.only:
        disk = small_disk() if name == "disk" else tempfile.TemporaryDirectory(prefix="redismem-bench-")
        with disk as folder:
            if folder is None:
                print(f"{name}: skipped: a small file system can be mounted by root only")
                found[name] = {"skipped": "no small file system could be mounted"}
                continue
            found[name] = run(staged(name, Path(folder)))
        show(name, found[name])
    print(write_result("faults", {"figures": found}, path=arguments.out))
    if any(told.get("writes", {}).get("lost") for told in found.values()):
        raise SystemExit("acknowledged writes were lost")


if __name__ == "__main__":
    main()
