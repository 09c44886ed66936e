"""A worker is killed at each of its round trips to Redis; another does what it left, and all is as it should.

Run as a program, this file is that worker: for each line `mode number` of its input it forks a process that
does what is due and kills itself, and prints how that ended.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from redismem.client import Client
from redismem.coherence import Coherence
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.keys import Owner
from redismem.l1 import L1
from redismem.lualib import Functions
from redismem.service import Service
from redismem.settings import Settings
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch
from redismem.worker import worker as worker_module
from redismem.worker.assembly import assembled_worker
from redismem.worker.pool import Pool
from redismem.worker.worker import Worker
from tests.conftest import until
from tests.property.test_derived_model import Inline, Stored, check, edges_of, stored
from tests.redis.test_worker import running

pytestmark = pytest.mark.accept

ROOT = Path(__file__).parents[2]
#: seconds ahead that cover every delay of a job
AHEAD_S = 7200.0
#: round trips between two kills
APART = 10
GARDEN = "I watered the {} seedlings in the greenhouse and added compost to the beds"
MUSIC = "I practised the {} sonata on the violin for the orchestra concert in May"

Kill = Callable[[str, str, int], Awaitable[str]]


# the process that is killed ----------------------------------------------------------------------------


def worker_of(functions: Functions, settings: Settings, *, claim_after_ms: int = 1) -> Worker:
    embedder, client = DeterministicEmbedder(), functions.client
    indexes = Indexes(functions, embedder)
    coherence = Coherence(client, L1(max_entries=0, max_bytes=0), lease_s=1)
    jobs = Jobs(functions, rest=0, claim_after_ms=claim_after_ms)
    return assembled_worker(settings, functions, embedder, indexes, jobs, coherence)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(number: int, *, late: bool) -> None:
    """Kill this process before its n-th round trip or, `late`, after Redis has done what it asks for."""
    calls = itertools.count(1)

    def killing(name: str) -> None:
        send = getattr(Client, name)

        async def sent(self: Client, *args: Any) -> Any:
            is_due = next(calls) == number
            if is_due and not late:
                die()
            reply = await send(self, *args)
            if is_due:
                die()
            return reply

        setattr(Client, name, sent)

    killing("execute")
    killing("pipeline")


async def work(settings: Settings, mode: str, number: int) -> None:
    client = Client(settings, settings.redis_url)
    worker = worker_of(Functions(client), settings, claim_after_ms=300)
    Pool.run = Inline.run  # type: ignore[method-assign,assignment]  # round trips in one order
    if mode == "run":
        asyncio.get_running_loop().call_later(number / 1000, die)
        await worker.run()
    die_at(number, late=mode == "late")
    await worker.settle(ahead_s=AHEAD_S)
    await client.close()


def main() -> None:
    settings = Settings(redis_url=sys.argv[1], embedder="deterministic", testing=True)
    importlib.import_module("sklearn.cluster")  # which each fork would import at its first topics: 1 s
    for line in sys.stdin:
        mode, number = line.split()
        if (pid := os.fork()) == 0:
            asyncio.run(work(settings, mode, int(number)))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print({-signal.SIGKILL: "killed", 0: "done"}.get(status, f"failed {status}"), flush=True)


@pytest.fixture(scope="module")
async def child(redis_url: str) -> AsyncIterator[Callable[[str, int], Awaitable[list[str]]]]:
    """Let a worker do what is due and kill it; return what it printed and how it ended."""
    process = subprocess.Popen(
        [sys.executable, __file__, redis_url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process as running:
        assert running.stdin is not None
        assert running.stdout is not None
        reading, writing = running.stdout, running.stdin

        async def one(mode: str, number: int) -> list[str]:
            writing.write(f"{mode} {number}\n")
            writing.flush()
            lines = [(await asyncio.to_thread(reading.readline)).strip()]
            while lines[-1].isdigit():
                lines.append((await asyncio.to_thread(reading.readline)).strip())
            assert lines[-1] in ("killed", "done"), lines
            return lines

        yield one


# what it leaves ------------------------------------------------------------------------------------------


async def fill(service: Service, user: str) -> Owner:
    """Write few memories: each is among the ten nearest of each, so that no edge depends on the order."""
    owner = Owner(user)
    texts = [*(GARDEN.format(f"zq{i}x") for i in range(5)), *(MUSIC.format(f"zq{i}x") for i in range(5, 10))]
    memories = [
        MemoryInput(id=f"id{i:02d}q", text=text, entities=["Ben"] if i % 3 == 0 else [])
        for i, text in enumerate([*texts, "My name is Ada. I am a baker"])
    ]
    await service.writer.put(owner, memories)
    return owner


async def change(service: Service, owner: Owner) -> None:
    await service.writer.delete(owner, "id00q")
    await service.writer.correct(
        owner, CorrectionRequest(ids=["id05q"], memory=MemoryInput(id="id20q", text=MUSIC.format("zq20x")))
    )
    await service.writer.update(owner, "id03q", MemoryPatch(text=GARDEN.format("zq23x")))
    await service.writer.put(owner, [MemoryInput(id="id08q", text=MUSIC.format("zq28x"))])


async def finish(service: Service, owner: Owner) -> None:
    """Let another worker do everything that is left, the dead one's jobs too."""
    worker, rounds = worker_of(service.functions, service.settings), itertools.count()

    async def is_finished() -> bool:
        # later each time: what waits for a run of the same job to end is put off by a second
        await worker.settle(ahead_s=AHEAD_S + 10 * next(rounds))
        counts = await service.jobs.counts()
        assert (counts.failing, counts.dead) == (0, 0)
        worker._reclaim_at_s = 0.0
        return (counts.waiting, counts.started) == (0, 0)

    await until("no job is left", is_finished, 20)
    found = await stored(service.client, owner)
    assert found.hash("profile")
    await worker.make(owner, "profile")  # whichever came first, topics or profile


async def made(service: Service, owner: Owner) -> dict[str, Any]:
    """Return what is derived, but for numbers of topics and moments."""
    found = await stored(service.client, owner)
    labels = {number: fields["label"].decode() for number, fields in found.each("cluster").items()}
    assert len(labels) == len(set(labels.values()))
    summaries = {}
    for name, fields in found.each("summary").items():
        kind, _, rest = name.partition(":")
        summaries[kind, labels[rest] if kind == "topic" else rest] = fields["text"], fields["sources"]
    profile = {name: raw for name, raw in found.hash("profile").items() if name not in MOVING}
    profile["topic_cluster_ids"] = msgspec.json.encode(
        sorted(msgspec.json.decode(profile["topic_cluster_ids"], type=dict[str, str]))
    )
    members: dict[str, list[str]] = {}
    for one, raw in sorted(found.live.items()):
        number = raw.get("cluster", b"").decode()
        members.setdefault(labels.get(number, number.partition("|")[0]), []).append(one)
    sizes = {labels[number]: int(fields["size"]) for number, fields in found.each("cluster").items()}
    return {
        "profile": profile,
        "summaries": summaries,
        "members": members,
        "sizes": sizes,
        "edges": edges_of(found),
        "conflicts": found.hash("conflicts"),
        "fresh": found.hash("fresh"),
    }


MOVING = ("compiled_at", "valid_until", "digests")


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "run", Inline.run)


@pytest.mark.parametrize("late", [False, True])
async def test_a_kill_at_any_round_trip_loses_no_job_and_makes_nothing_else(
    service: Service, child: Callable[[str, int], Awaitable[list[str]]], late: bool
) -> None:
    owner = await fill(service, "undisturbed")
    await finish(service, owner)
    wanted = await made(service, owner)
    assert len(wanted["sizes"]) == 2
    assert {kind for kind, _ in wanted["summaries"]} == {"topic", "day", "week", "month", "entity"}
    number = 1 + late * APART // 2
    while True:
        owner = await fill(service, f"killed at {number}")
        ended = await child("late" if late else "early", number)
        check(await stored(service.client, owner))
        await finish(service, owner)
        found = await stored(service.client, owner)
        check(found)
        assert await made(service, owner) == wanted, number
        if ended == ["done"]:
            break
        number += APART
    assert number > 100


@pytest.mark.parametrize("late", [False, True])
async def test_what_was_deleted_while_a_worker_was_dead_appears_nowhere(
    service: Service, child: Callable[[str, int], Awaitable[list[str]]], late: bool
) -> None:
    number = 4 + late * APART // 2
    while True:
        owner = await fill(service, f"killed at {number}")
        ended = await child("late" if late else "early", number)
        await change(service, owner)
        check(await stored(service.client, owner))
        await finish(service, owner)
        found: Stored = await stored(service.client, owner)
        check(found)
        assert {"id00q", "id05q"}.isdisjoint(found.live)
        assert len({frozenset(ends) for ends in edges_of(found)}) == 10 * 9 / 2
        if ended == ["done"]:
            break
        number += APART
    assert number > 100


async def test_workers_that_are_killed_while_they_serve_lose_nothing(
    service: Service, child: Callable[[str, int], Awaitable[list[str]]]
) -> None:
    rng = random.Random(0)
    owners = []
    for i in range(4):
        owners.append(await fill(service, f"served {i}"))
        await service.jobs.queue(owners[-1], "link", "topics", "profile", "periods", "summary:entity:Ben")
        assert await child("run", rng.randrange(20, 400)) == ["killed"]
        await change(service, owners[-1])
    for owner in owners:
        await finish(service, owner)
        check(await stored(service.client, owner))


async def test_a_long_job_is_not_taken_over_while_its_worker_runs(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    async def long(_tools: object, owner: Owner) -> None:
        begun.append(owner.user)
        await asyncio.sleep(3)

    monkeypatch.setitem(worker_module._OF_OWNER, "profile", long)
    await service.jobs.queue(await fill(service, "alice"), "profile")
    workers = [worker_of(service.functions, service.settings, claim_after_ms=1000) for _ in range(2)]

    async def is_done() -> bool:
        return any(one.counts["profile done"] for one in workers)

    async with running(*workers):
        await until("the job is done", is_done)
    assert begun == ["alice"]


if __name__ == "__main__":
    main()
