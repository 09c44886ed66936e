"""The only place that builds and drops the HNSW graphs of large users; lua/graph.lua tells what they are.

A graph is built beside what serves, in calls that hold Redis for about 10 ms, with pauses between them;
then one call makes searches use it. All that is known of a build is in Redis, so a crash at any point
leaves a build that goes on where it stopped, or starts anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from redismem.client import Client
from redismem.errors import RedisMemError
from redismem.index import all_ids
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.settings import HnswProfile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Profile:
    """Parameters of a graph: links a node (M), widths of construction (efConstruction) and of search (EF)."""

    links: int
    width: int
    ef: int


PROFILES: dict[HnswProfile, Profile] = {
    "production": Profile(links=32, width=200, ef=128),
    "high_recall": Profile(links=48, width=400, ef=256),
    "low_latency": Profile(links=16, width=100, ef=64),
}

#: ids that one call is given; it stops after a few that it had to add
_SLICE = 500

#: pause after a call, as a share of its time: others are served in it
_PAUSE = 0.5

#: walks over all ids until every vector is in; more than one only when another hand writes vectors
_MAX_WALKS = 5

#: Vectors added to graphs since the append-only file was last rewritten. Loading adds each of them once more,
#: 1 to 2 ms a piece, while what a rewrite has stored as a graph costs 0.01 ms: so this many are 10 s of a
#: restart. More where the rest of the data takes as long to load (about 100 MB/s).
MAX_LOGGED = 5_000
_LOADED_BYTES_PER_LOGGED = 200_000

_POLL_S = 0.1
_REWRITE_S = 600.0


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph as `meta` remembers it."""

    number: int
    profile: str
    links: int
    width: int
    ef: int

    @classmethod
    def parsed(cls, raw: bytes | None) -> Graph | None:
        """Return the graph of a field of `meta`; None without one."""
        if raw is None:
            return None
        number, profile, *numbers = raw.decode().split()
        return cls(int(number), profile, *map(int, numbers))


class Graphs:
    """Builds and drops graphs; `supported` is False once the server said that it has no vector sets."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self.supported = True

    async def build(self, owner: Owner, profile: HnswProfile, *, restart: bool = False) -> bool:
        """Build the graph of an owner and make searches use it; return whether they do.

        Args:
            restart: begin anew although a build of these parameters was begun.

        Cost: about 3 ms a memory at 384 dimensions, half of it Redis's time, in pieces of 10 ms.
        """
        wanted = PROFILES[profile]
        begun = await self._functions.call(
            "rm_graph_begin_v1",
            [owner.meta, *owner.graphs],
            *(profile, wanted.links, wanted.width, wanted.ef, int(restart)),
        )
        if begun == b"UNSUPPORTED":
            self.supported = False
            logger.warning("this Redis has no vector sets (Redis 8 has): searches of large users stay exact")
        if begun not in (b"STARTED", b"RESUMED"):
            return False
        for _ in range(_MAX_WALKS):
            if not await self._walk(owner):
                return False
            # stored as a graph before it is used: what is used must not cost a restart its loading
            await self.bound_log([owner], most=0)
            outcome, *counts = await self._functions.call(
                "rm_graph_switch_v1", [owner.index, owner.meta, *owner.graphs]
            )
            if outcome != b"SHORT":
                return bool(outcome == b"OK")
            logger.info("the graph of a user has %d of %d vectors: walking again", *counts)
        return False

    async def _walk(self, owner: Owner) -> bool:
        """Offer every memory to the graph that is being built; False when the build was called off."""
        ids = await all_ids(self._functions.client, owner)
        first = added_since = 0
        while first < len(ids):
            started = time.perf_counter()
            outcome, *done = await self._functions.call(
                "rm_graph_grow_v1",
                [owner.meta, *owner.graphs],
                *(owner.memory_prefix, *ids[first : first + _SLICE]),
            )
            if outcome == b"GONE":
                return False
            first += done[0]
            added_since += done[0]
            if added_since >= MAX_LOGGED:
                added_since = 0
                await self.bound_log([owner])
            await asyncio.sleep(_PAUSE * (time.perf_counter() - started))
        return True

    async def drop(self, owner: Owner) -> None:
        """Make an owner's searches exact, and remove the graphs."""
        await self._functions.call("rm_graph_drop_v1", [owner.meta, *owner.graphs])

    async def bound_log(self, owners: list[Owner], *, most: int = MAX_LOGGED) -> bool:
        """Rewrite the append-only file if these owners added more than `most` vectors since; return whether.

        A server that refuses, or has no such file, is left as it is.
        """
        client = self._functions.client
        counts = [
            int(raw or 0)
            for raw in await client.pipeline([("HGET", owner.meta, "graph_writes") for owner in owners])
        ]
        try:
            if not sum(counts) or not await _rewritten(client, sum(counts), most):
                return False
        except (RedisMemError, TimeoutError) as exc:
            logger.warning("the append-only file was not rewritten, a restart will take longer: %s", exc)
            return False
        await client.pipeline(
            [
                ("HINCRBY", owner.meta, "graph_writes", -count)
                for owner, count in zip(owners, counts, strict=True)
                if count
            ]
        )
        return True


async def _rewritten(client: Client, logged: int, most: int) -> bool:
    info = await _info(client)
    if info.get(b"aof_enabled") != b"1":
        return True  # snapshots hold graphs as graphs
    if most:
        most = max(most, int(info[b"used_memory"]) // _LOADED_BYTES_PER_LOGGED)
    if logged <= most:
        return False
    await _rewrite_ended(client)  # one that runs may have begun before our vectors
    await client.execute("BGREWRITEAOF")
    return await _rewrite_ended(client)


async def _rewrite_ended(client: Client) -> bool:
    async with asyncio.timeout(_REWRITE_S):
        while True:
            info = await _info(client)
            if info[b"aof_rewrite_in_progress"] == info[b"aof_rewrite_scheduled"] == b"0":
                return info[b"aof_last_bgrewrite_status"] == b"ok"
            await asyncio.sleep(_POLL_S)


async def _info(client: Client) -> dict[bytes, bytes]:
    lines = (await client.execute("INFO", "persistence", "memory")).splitlines()
    return dict(line.split(b":", 1) for line in lines if b":" in line)
