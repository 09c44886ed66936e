"""What does the barrier of a strong write cost, and how long until a foreign write has left every L1?

One, two and four separately started services on one Redis, with an embedder that costs nothing. Deletes
(strong) and updates, with and without a barrier, by one client at one of them, turn by turn, idle and while
others read; writes past the service, by a raw connection, while every process is asked without pause; and
deletes while a process is stopped or was killed.
Usage: python bench/coherence.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import Connection, Request, Server, Tally, closed_loop, percentiles, request_bytes

PROCESSES = (1, 2, 4)
CHEAP = {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1"}
#: of each kind
WRITES = 300
READERS = 4
#: readers rest between two reads: on few cores readers without pause would measure the scheduler
READER_PAUSE_S = 0.01
FOREIGN_WRITES = 200
#: seconds for every process to keep the memory again
SETTLE_S = 0.005
SILENCES = 5
DELETES_IN_SILENCE = 4
BATCH = 200
USER = "/v1/users/writer"
READER = "/v1/users/reader"
QUERY = {"text": "where did we meet", "search_mode": "keyword"}
#: a silent process is waited for as long as its lease of 2 s runs; this much is for the wait to be noticed
LONGEST_MS = 2_100

Figures = dict[str, Any]


@contextmanager
def fleet(processes: int) -> Iterator[list[Server]]:
    """Run so many services on one Redis; it belongs to the first."""
    with ExitStack() as stack:
        servers = [stack.enter_context(harness.running_server(**CHEAP))]
        shared = {**CHEAP, "REDISMEM_REDIS_URL": servers[0].redis_url}
        servers += [stack.enter_context(harness.running_server(**shared)) for _ in range(processes - 1)]
        yield servers


@contextmanager
def reading(servers: list[Server]) -> Iterator[None]:
    """Let a process of its own read at every server, from L1."""
    command = [sys.executable, __file__, "--read", *(server.url for server in servers)]
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.terminate()


async def read_on(urls: list[str]) -> None:
    """Search until the end of this process."""

    async def reader(url: str) -> None:
        http = Connection(url)
        while True:
            status, reply = await http.request("POST", READER + "/search", QUERY)
            assert status == 200, reply
            await asyncio.sleep(READER_PAUSE_S)

    await asyncio.gather(*(reader(url) for url in urls for _ in range(READERS)))


async def store(server: Server, user: str, ids: list[str]) -> None:
    """Store a memory for each id."""
    http = Connection(server.url)
    for first in range(0, len(ids), BATCH):
        batch = [{"id": i, "text": f"we met at the station {i}"} for i in ids[first : first + BATCH]]
        status, reply = await http.request("POST", user + "/memories", {"memories": batch})
        assert status == 201, reply
    http.close()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something to become true."""
    ends_s = time.monotonic() + 10
    while not condition():
        if time.monotonic() > ends_s:
            raise SystemExit(f"waited in vain until {what}")
        await asyncio.sleep(0.01)


def stats(server: Server) -> Figures:
    told: Figures = httpx.get(server.url + "/v1/stats").json()
    return told


def l1_hits(server: Server) -> int:
    return int(stats(server)["l1"]["search"]["hits"])


# the questions ------------------------------------------------------------------------------------


async def measure_writes(servers: list[Server], writes: int) -> Figures:
    """Return acknowledgements of one client that deletes, updates, and updates strongly, in turn."""
    numbers = range(writes)
    kinds = ("delete", "update", "strong update")
    await store(servers[0], USER, [f"{kind[0]}{number}" for kind in kinds for number in numbers])
    requests: list[Request] = []
    for number in numbers:
        path, change = USER + "/memories/", {"metadata": {"number": number}}
        requests += [
            ("delete", request_bytes("DELETE", f"{path}d{number}")),
            ("update", request_bytes("PATCH", f"{path}u{number}", change)),
            ("strong update", request_bytes("PATCH", f"{path}s{number}?consistency=strong", change)),
        ]
    tally = Tally()
    before = [l1_hits(server) for server in servers]
    tally.seconds = await closed_loop(servers[0].url, iter(requests), tally.saw)
    assert not tally.errors, tally.errors
    pairs = zip(tally.times["strong update"], tally.times["update"], strict=True)
    reads = [l1_hits(server) - hits for server, hits in zip(servers, before, strict=True)]
    return {
        **{kind: percentiles(tally.times[kind]) for kind in kinds},
        "barrier (difference of neighbours)": percentiles([strong - plain for strong, plain in pairs]),
        "barrier_timeouts": stats(servers[0])["coherence"]["barrier_timeouts"],
        "l1_hits_per_s": [round(count / tally.seconds) for count in reads],
    }


async def measure_foreign(servers: list[Server], writes: int) -> Figures:
    """Return milliseconds from the reply to a raw HSET until every process has answered with it."""
    await store(servers[0], USER, ["far"])
    raw, key = Redis.from_url(servers[0].redis_url), "redismem:memory:{writer}:far"
    get = request_bytes("GET", USER + "/memories/far")
    text, written_s, stale, over = b"station", float("inf"), 0, False
    fresh_s: dict[str, float] = {}

    def poll(url: str) -> asyncio.Task[float]:
        def saw(name: str, took_ms: float, reply: bytes) -> None:
            nonlocal stale
            if text in reply:
                fresh_s.setdefault(url, time.perf_counter())
            else:
                stale += time.perf_counter() - took_ms / 1000 > written_s

        requests = takewhile(lambda _: not over, repeat(("get", get)))
        return asyncio.create_task(closed_loop(url, requests, saw))

    polls = [poll(server.url) for server in servers]
    times = []
    for number in range(-1, writes):
        await asyncio.sleep(SETTLE_S)
        written_s = float("inf")
        text = f"moved {number} times".encode()
        fresh_s.clear()
        await raw.hset(key, "text", text.decode())
        written_s = time.perf_counter()
        await until(lambda: len(fresh_s) == len(servers), "every process has the new text")
        if number >= 0:  # the first was warm-up
            times.append(max(0.0, max(fresh_s.values()) - written_s) * 1000)
    over = True
    await asyncio.gather(*polls)
    await raw.aclose()
    return {"until fresh everywhere": percentiles(times), "max_ms": max(times), "stale_replies": stale}


async def measure_silence(servers: list[Server], silences: int) -> Figures:
    """Return milliseconds of deletes that follow each other after a process fell silent."""
    figures: Figures = {"stopped": [], "killed": [], "deleted_but_answered": 0}
    for number in range(silences):
        figures["stopped"].append(await _deletes(servers, servers[-1], f"stop{number}-", signal.SIGSTOP))
        os.kill(servers[-1].pid, signal.SIGCONT)
        ids = [f"stop{number}-{i}" for i in range(DELETES_IN_SILENCE)]
        figures["deleted_but_answered"] += (await _statuses(servers[-1], ids)).count(200)
    while len(servers) > 1:
        victim = servers[-1]
        figures["killed"].append(await _deletes(servers, victim, f"kill{len(servers)}-", signal.SIGKILL))
        servers = servers[:-1]
    return figures


async def _deletes(servers: list[Server], victim: Server, prefix: str, blow: signal.Signals) -> list[float]:
    """Silence a process that holds memories in its L1, and return the milliseconds of their deletes."""
    ids = [prefix + str(number) for number in range(DELETES_IN_SILENCE)]
    await store(servers[0], USER, ids)
    await until(lambda: stats(victim)["coherence"]["live"], "its L1 may answer")
    assert await _statuses(victim, ids) == [200] * len(ids)
    os.kill(victim.pid, blow)
    tally = Tally()
    deletes = (("delete", request_bytes("DELETE", f"{USER}/memories/{memory_id}")) for memory_id in ids)
    await closed_loop(servers[0].url, deletes, tally.saw)
    assert not tally.errors, tally.errors
    return [round(took_ms, 1) for took_ms in tally.times["delete"]]


async def _statuses(server: Server, ids: list[str]) -> list[int]:
    http = Connection(server.url)
    statuses = [(await http.request("GET", f"{USER}/memories/{memory_id}"))[0] for memory_id in ids]
    http.close()
    return statuses


async def measure(processes: int, share: int) -> Figures:
    """Return all figures of so many processes."""
    figures: Figures = {}
    with fleet(processes) as servers:
        await store(servers[0], READER, [f"r{number}" for number in range(BATCH)])
        figures["idle"] = await measure_writes(servers, WRITES // share)
        with reading(servers):
            start = [l1_hits(server) for server in servers]
            warm = zip(servers, start, strict=True)
            await until(lambda: all(l1_hits(s) > hits for s, hits in warm), "readers hit every L1")
            figures["beside readers"] = await measure_writes(servers, WRITES // share)
        figures["foreign write"] = await measure_foreign(servers, FOREIGN_WRITES // share)
        if processes == PROCESSES[-1]:
            figures["silence"] = await measure_silence(servers, max(1, SILENCES // share))
    return figures


def show(name: str, row: Figures) -> None:
    """Print what has percentiles, one a line."""
    if "p50" in row:
        print(f"{name:64}{row['p50']:10.2f}{row['p95']:10.2f}{row['p99']:10.2f} ms{row['n']:8}")
    for key, part in row.items():
        if isinstance(part, dict):
            show(f"{name}, {key}", part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of everything; writes nothing")
    parser.add_argument("--read", nargs="+", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        harness.run(read_on(arguments.read))
    figures: Figures = {}
    for processes in PROCESSES:
        name = f"{processes} processes"
        figures[name] = harness.run(measure(processes, 5 if arguments.quick else 1))
        show(name, figures[name])
        print(f"{name}, foreign write, stale replies: {figures[name]['foreign write']['stale_replies']}")
    silence = figures[name]["silence"]
    print("deletes after a process was silenced, ms:", silence)
    longest_ms = max(max(times) for times in silence["stopped"] + silence["killed"])
    print(
        f"longest wait {longest_ms:.0f} ms, {'' if longest_ms <= LONGEST_MS else 'MISSED: '}<= {LONGEST_MS}"
    )
    if not arguments.quick:
        print(harness.write_result("coherence", {"longest_wait_ms": longest_ms, "figures": figures}))


if __name__ == "__main__":
    main()
