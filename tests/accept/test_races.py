"""Many clients on few ids over two processes: what was deleted last is nowhere, and nothing is torn.

Every operation is noted with the moments it was sent and answered. A linearizable store leaves traces
only: whoever saw a memory must have had a put that no finished delete followed, and whoever missed it
a put that some delete may have followed. Both are checked per id, over all reads and the final state.
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import httpx
import numpy as np
import pytest

from redismem.client import Client
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.keys import Owner
from redismem.vectors import Turn, turn_vectors
from tests.accept.conftest import USER, Start, all_memories, memory_path
from tests.conftest import until

pytestmark = pytest.mark.accept

#: rounds, and those at most until everything was seen often enough
ROUNDS, MOST_ROUNDS = 12, 60
ROUND_S = 0.4
#: replies of each kind that must have been seen, and how often
SEEN = (("put", 201), ("put", 202), ("delete", 200), ("patch", 200), ("correct", 201))
LEAST_SEEN = 6
DUELS = 15
CLIENTS = 16
HOT_HZ = 20
EMBED_S = 0.004
REDIS_S = 0.004
IDS = [f"m{i}" for i in range(8)]
SESSIONS = [None, "s1", "s2"]
WORDS = "amber basil cedar delta ember fern".split()
EVERYTHING = {"superseded": "include"}

Interval = tuple[float, float]


@dataclass
class Record:
    """What happened to one id; each interval is (sent, answered)."""

    puts: list[Interval] = field(default_factory=list)
    deletes: list[Interval] = field(default_factory=list)
    seen: list[Interval] = field(default_factory=list)
    missed: list[Interval] = field(default_factory=list)

    def contradictions(self) -> list[str]:
        """Return the reads that no order of the operations explains."""
        wrong = []
        put_end = _latest([(start, end) for start, end in self.puts])
        put_start = _latest([(end, start) for start, end in self.puts])
        delete_start = _latest([(end, start) for start, end in self.deletes])
        delete_end = _latest([(start, end) for start, end in self.deletes])
        for start, end in self.seen:
            if put_end(end) < delete_start(start) or put_end(end) == -np.inf:
                wrong.append(f"seen in {start:.4f}-{end:.4f} after its delete")
        for start, end in self.missed:
            if put_start(start) > delete_end(end):
                wrong.append(f"missed in {start:.4f}-{end:.4f} after its put")
        return wrong


class _latest:  # noqa: N801  # reads as the function it is
    """Of pairs (when, what): the largest `what` among those with `when` before a moment."""

    def __init__(self, pairs: Sequence[Interval]) -> None:
        pairs = sorted(pairs)
        self._when = [when for when, _ in pairs]
        self._what = list(accumulate((what for _, what in pairs), max))

    def __call__(self, moment: float) -> float:
        place = bisect_left(self._when, moment)
        return self._what[place - 1] if place else -np.inf


def test_the_check_finds_a_ghost_and_a_loss() -> None:
    ghost = Record(puts=[(0, 1)], deletes=[(2, 3)], seen=[(4, 5)])
    assert len(ghost.contradictions()) == 1
    loss = Record(puts=[(0, 1), (4, 5)], deletes=[(2, 3)], missed=[(6, 7)])
    assert len(loss.contradictions()) == 1
    never = Record(seen=[(0, 1)])
    assert len(never.contradictions()) == 1
    overlapping = Record(
        puts=[(0, 1), (2, 5)], deletes=[(3, 4)], seen=[(6, 7), (2, 4)], missed=[(6, 7), (0, 1)]
    )
    assert overlapping.contradictions() == []
    lucky = Record(puts=[(0, 3)], deletes=[(1, 2)], seen=[(4, 5)], missed=[(4, 5)])
    assert lucky.contradictions() == []


class Run:
    """Clients of the processes, and what they saw."""

    def __init__(self, clients: list[httpx.AsyncClient]) -> None:
        self.clients = clients
        self.records: defaultdict[str, Record] = defaultdict(Record)
        self.statuses: defaultdict[tuple[str, int], int] = defaultdict(int)

    async def act(self, rng: random.Random, action: str, memory_id: str) -> None:
        """Do one thing and note what it says about the memory."""
        http, record = rng.choice(self.clients), self.records[memory_id]
        path, started = memory_path(memory_id), time.perf_counter()
        content = {
            "text": f"common {rng.choice(WORDS)} {rng.choice(WORDS)}",
            "session_id": rng.choice(SESSIONS),
        }
        match action:
            case "put":
                url = f"{USER}/memories?wait={rng.choice(['true', 'false'])}"
                reply = await http.post(url, json={"id": memory_id, **content})
                noted = {201: record.puts, 202: record.puts}
            case "delete":
                reply = await http.delete(path)
                noted = {200: record.deletes, 404: record.missed}
            case "patch":
                change = content if rng.random() < 0.6 else {"importance": round(rng.random(), 2)}
                reply = await http.patch(path, json=change)
                noted = {200: record.seen, 404: record.missed, 412: []}
            case "correct":
                new = rng.choice([other for other in IDS if other != memory_id])
                body = {"ids": [memory_id], "memory": {"id": new, **content}}
                reply = await http.post(f"{USER}/corrections", json=body)
                noted = {201: record.seen, 404: record.missed, 409: self.records[new].seen}
                if reply.status_code == 201 and reply.json()["outcome"] == "CREATED":
                    self.records[new].puts.append((started, time.perf_counter()))
            case _:
                reply = await http.get(path)
                noted = {200: record.seen, 404: record.missed}
        self.statuses[action, reply.status_code] += 1
        assert reply.status_code in noted, f"{action}: {reply.status_code} {reply.text}"
        noted[reply.status_code].append((started, time.perf_counter()))

    async def look(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        """Read everything one way and note for each id whether it was there.

        An eventual search may miss what is new for a minute, but never show what is gone.
        """
        started = time.perf_counter()
        how, consistency = rng.choice(["keyword", "hybrid", "list", "export"]), "strong"
        if how == "list":
            ids = set(await all_memories(http))
        elif how == "export":
            reply = await http.get(f"{USER}/export")
            ids = {line.split('"')[3] for line in reply.text.splitlines()}
        else:
            consistency = rng.choice(["eventual", "strong"])
            query = {"text": "common", "search_mode": how, "filters": EVERYTHING, "limit": 100}
            query["consistency"] = consistency
            reply = await http.post(f"{USER}/search", json=query)
            assert reply.status_code == 200, reply.text
            ids = {hit["id"] for hit in reply.json()["memories"]}
        ended = time.perf_counter()
        assert ids <= set(IDS)
        for memory_id in IDS:
            record = self.records[memory_id]
            if memory_id in ids:
                record.seen.append((started, ended))
            elif consistency == "strong":
                record.missed.append((started, ended))

    async def client(self, seed: int, until_s: float) -> None:
        rng = random.Random(seed)
        actions = rng.choices(
            ["put", "delete", "patch", "correct", "get", "look"], [30, 15, 18, 15, 10, 12], k=9999
        )
        for action in actions:
            if time.perf_counter() > until_s:
                return
            if action == "look":
                await self.look(rng, rng.choice(self.clients))
            else:
                hot = IDS[int(time.perf_counter() * HOT_HZ) % len(IDS)]  # where most clients meet
                await self.act(rng, action, hot if rng.random() < 0.7 else rng.choice(IDS))

    async def duels(self, memory_id: str) -> None:
        """Let a delete race a rewrite again and again, and look who won."""
        rng = random.Random(memory_id)
        for _ in range(DUELS):
            await self.act(rng, "put", memory_id)
            await asyncio.gather(self.act(rng, "patch", memory_id), self.act(rng, "delete", memory_id))
            await self.act(rng, "get", memory_id)

    async def last_deletes(self, rng: random.Random, memory_ids: list[str]) -> None:
        """Leave embeddings under way, then delete: the delete is what counts."""
        for action in ("put", "patch", "delete"):
            await asyncio.gather(*(self.act(rng, action, memory_id) for memory_id in memory_ids))


async def stored(redis: Client, owner: Owner) -> dict[str, dict[bytes, bytes]]:
    """Return every hash of the owner by id."""
    keys = await redis.execute("KEYS", "redismem:memory:{alice}:*")
    rows = await redis.pipeline([("HGETALL", key) for key in keys])
    return {
        key.decode().removeprefix(owner.memory_prefix): dict(zip(row[::2], row[1::2], strict=True))
        for key, row in zip(keys, rows, strict=True)
    }


async def check_links(redis: Client, owner: Owner, hashes: dict[str, dict[bytes, bytes]]) -> dict[str, str]:
    """Check that the sessions hold exactly the current turns, linked both ways; return id -> id before."""
    raw = await redis.execute("HGETALL", owner.turns)
    turns = {key.decode(): value.decode() for key, value in zip(raw[::2], raw[1::2], strict=True)}
    places = {key[1:]: value.split("\x1f") for key, value in turns.items() if key.startswith("l")}
    current = {i for i, row in hashes.items() if b"session_id" in row and b"superseded_by" not in row}
    assert set(places) == current
    session_of = {memory_id: hashes[memory_id][b"session_id"].decode() for memory_id in places}
    for memory_id, (before, after, *_) in places.items():
        if before:
            assert places[before][1] == memory_id
            assert session_of[before] == session_of[memory_id]
        if after:
            assert places[after][0] == memory_id
        else:
            assert turns["t" + session_of[memory_id]].split("\x1f")[0] == memory_id
    tails = {key[1:] for key in turns if key.startswith("t")}
    assert tails == set(session_of.values())
    return {memory_id: place[0] for memory_id, place in places.items()}


async def check_vectors(hashes: dict[str, dict[bytes, bytes]], before: dict[str, str]) -> None:
    """Check that each vector is that of its text and the turn before, as if made now."""
    embedder = DeterministicEmbedder()
    for memory_id, row in hashes.items():
        assert row[b"embedder"].decode() == embedder.name
        previous = before.get(memory_id)
        turn = Turn(row[b"text"].decode(), hashes[previous][b"text"].decode() if previous else None)
        if b"superseded_by" in row:  # its vector is of the turns it stood between
            continue
        (vector,) = await turn_vectors(embedder, [turn])
        kept = np.frombuffer(row[b"embedding"], np.float16)
        assert np.allclose(kept, vector, atol=2e-3), f"{memory_id} has a vector of other texts"


async def check_stored(redis: Client, owner: Owner) -> set[str]:
    """Wait until every vector is made; check that all keys tell the same; return the ids."""

    async def settled() -> bool:
        return all(b"embedder" in row for row in (await stored(redis, owner)).values())

    await until("every vector is made", settled, 15)
    hashes = await stored(redis, owner)
    assert {raw.decode() for raw in await redis.execute("ZRANGE", owner.ids, 0, -1)} == set(hashes)
    count, *keys = await redis.execute("FT.SEARCH", owner.index, "*", "NOCONTENT", "DIALECT", 2)
    assert (count, {key.decode() for key in keys}) == (len(hashes), {owner.memory(i) for i in hashes})
    await check_vectors(hashes, await check_links(redis, owner, hashes))
    return set(hashes)


async def test_no_order_of_writes_brings_a_deleted_memory_back(start: Start, redis: Client) -> None:
    processes = await asyncio.gather(*(start(embed_s=EMBED_S, redis_s=REDIS_S) for _ in range(2)))
    owner, run, rng = Owner("alice"), Run([process.http for process in processes]), random.Random(0)
    for number in range(MOST_ROUNDS):
        if number >= ROUNDS and all(run.statuses[kind] >= LEAST_SEEN for kind in SEEN):
            break
        end = time.perf_counter() + ROUND_S
        await asyncio.gather(*(run.client(CLIENTS * number + i, end) for i in range(CLIENTS)))
        await check_stored(redis, owner)
    await asyncio.gather(*(run.duels(memory_id) for memory_id in IDS))
    await run.last_deletes(rng, IDS[:4])
    assert not set(IDS[:4]) & await check_stored(redis, owner)
    for process in processes:
        for _ in range(8):
            await run.look(rng, process.http)
        for memory_id in IDS:
            await run.act(rng, "get", memory_id)
    assert {memory_id: record.contradictions() for memory_id, record in run.records.items()} == {
        memory_id: [] for memory_id in IDS
    }
    for kind in SEEN:
        assert run.statuses[kind] >= LEAST_SEEN, dict(run.statuses)
