"""Rounds over all users: each gets the index that fits, and what is old or idle leaves Redis.

One process of a store makes rounds at a time. Whatever a round begins is remembered in Redis, not here, so
the next one, of any process, goes on after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, cast

import msgspec

from redismem.archive import Archive
from redismem.client import Client
from redismem.errors import RedisMemError
from redismem.graph import PROFILES, Graphs
from redismem.index import Indexes, is_worn
from redismem.keys import MAINTENANCE_LOCK, STORE, Owner
from redismem.settings import HnswProfile, Settings
from redismem.store import owners

logger = logging.getLogger(__name__)

Action = Literal["complete", "promote", "demote", "park", "sweep", "refresh"]

#: share of the threshold below which a graph is dropped: a user at the threshold must not come and go
HYSTERESIS = 0.8

#: share of the time between two rounds after which another process may make one: all of a service's workers
#: try as often
_OFTEN = 0.9

#: users whose facts are read in one round trip
_PAGE = 100

#: the lock outlives its holder by this much; it is renewed three times as often
_LOCK_MS = 5_000

_DAY_S = 86_400

_IF_HELD = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
_RENEW = _IF_HELD + "return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
_RELEASE = _IF_HELD + "return redis.call('DEL', KEYS[1])"

_FACTS = (
    "index_state",
    "graph",
    "graph_next",
    "graph_profile",
    "next_embedder",
    "last_activity",
    "last_read",
    "reindexed",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What decides about a user's index."""

    memories: int
    index_state: str = ""
    has_graph: bool = False
    is_building: bool = False
    #: there are keys of graphs that neither serve nor are built
    has_leftovers: bool = False
    is_moving: bool = False
    #: an operator gave this user a profile, so a graph of theirs stays whatever its size
    has_own_profile: bool = False
    used_s: float = 0.0
    #: memories that were indexed anew since the index was made
    reindexed: int = 0


class Round(msgspec.Struct, kw_only=True):
    """What the last round saw and did."""

    at_s: float = 0.0
    took_s: float = 0.0
    users: int = 0
    memories: int = 0
    graphs: int = 0
    parked: int = 0
    filling: int = 0
    #: how often each action was carried out
    done: dict[str, int] = msgspec.field(default_factory=dict)
    archived: int = 0
    errors: int = 0


def due(facts: Facts, settings: Settings, now_s: float, *, has_graphs: bool = True) -> Action | None:
    """Return what is to be done about a user's index; None when it fits.

    Args:
        has_graphs: whether the server can hold graphs.
    """
    idle_s = settings.idle_index_days * _DAY_S
    if facts.is_moving or facts.index_state == "cold":
        return None
    if idle_s and facts.used_s < now_s - idle_s:
        return "park"
    return "complete" if facts.index_state else _fitting(facts, settings, has_graphs=has_graphs)


def _fitting(facts: Facts, settings: Settings, *, has_graphs: bool) -> Action | None:
    """Return what is to be done about an index that is whole."""
    is_graphed = facts.has_graph or facts.is_building
    is_small = facts.memories < HYSTERESIS * settings.hnsw_threshold
    if is_graphed and is_small and not facts.has_own_profile:
        return "demote"
    is_large = facts.memories >= settings.hnsw_threshold
    if has_graphs and (facts.is_building or (is_large and not facts.has_graph)):
        return "promote"
    if facts.has_leftovers and not is_graphed:
        return "sweep"
    return "refresh" if is_worn(facts.reindexed, facts.memories) else None


class Maintenance:
    """Makes rounds; `warm` is told of users whose index is new."""

    def __init__(
        self,
        client: Client,
        indexes: Indexes,
        graphs: Graphs,
        archive: Archive,
        settings: Settings,
        *,
        warm: Callable[[Owner], Awaitable[object]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._indexes = indexes
        self._graphs = graphs
        self._archive = archive
        self._settings = settings
        self._warm = warm
        self._clock = clock
        self._building_from_s: float | None = None

    async def run(self, every_s: float) -> None:
        """Make a round every so many seconds until cancelled; whatever goes wrong waits for the next."""
        while True:
            try:
                await self.round(unless_since_s=self._clock() - _OFTEN * every_s)
            except RedisMemError as exc:
                logger.warning("maintenance goes on later: %s", exc)
            except Exception:  # a defect in one round must not end all others
                logger.exception("a round of maintenance failed")
            await asyncio.sleep(every_s)

    async def round(self, *, unless_since_s: float = math.inf) -> Round | None:
        """Bring every user's index to what fits; None when another process is at it.

        Args:
            unless_since_s: also None when a round of any process began after this moment (epoch seconds).

        Cost: a SCAN of the keyspace and one round trip per 100 users, besides what is to be done.
        """
        async with self._lock() as held:
            if not held or await self._began_s() > unless_since_s:
                return None
            started, report, done = time.perf_counter(), Round(at_s=self._clock()), Counter[str]()
            logged: list[Owner] = []
            async for owner, facts, has_logged in self._users():
                self._count(report, facts)
                if has_logged:
                    logged.append(owner)
                action = due(facts, self._settings, self._clock(), has_graphs=self._graphs.supported)
                try:
                    if action is not None and await self._act(owner, action):
                        done[action] += 1
                    report.archived += await self._archived(owner)
                except RedisMemError as exc:
                    report.errors += 1
                    logger.warning("%s of a user's index goes on later: %s", action or "archiving", exc)
            await self._graphs.bound_log(logged)
            report.done, report.took_s = dict(done), round(time.perf_counter() - started, 3)
            await self._client.execute("HSET", STORE, "maintenance", msgspec.json.encode(report))
            return report

    async def _began_s(self) -> float:
        """Return when the last round began; 0 before the first."""
        raw = await self._client.execute("HGET", STORE, "maintenance")
        return msgspec.json.decode(raw, type=Round).at_s if raw else 0.0

    @staticmethod
    def _count(report: Round, facts: Facts) -> None:
        report.users += 1
        report.memories += facts.memories
        report.graphs += facts.has_graph
        report.parked += facts.index_state == "cold"
        report.filling += facts.index_state.startswith("filling")

    def building_s(self) -> float:
        """Return for how many seconds this process has worked on one user's index; 0: it does not."""
        return 0.0 if self._building_from_s is None else time.monotonic() - self._building_from_s

    async def _act(self, owner: Owner, action: Action) -> bool:
        self._building_from_s = time.monotonic()
        try:
            return await self._acted(owner, action)
        finally:
            self._building_from_s = None

    async def _acted(self, owner: Owner, action: Action) -> bool:
        match action:
            case "complete":
                is_done = await self._indexes.complete(owner, None)
            case "promote":
                is_done = await self._graphs.build(owner, await self.profile(owner))
            case "park":
                idle_s = self._settings.idle_index_days * _DAY_S
                return await self._indexes.park(owner, self._clock() - idle_s)
            case "refresh":
                return await self._indexes.refresh(owner)
            case "demote" | "sweep":
                await self._graphs.drop(owner)
                return True
        if is_done:
            await self._warm(owner)
        return is_done

    async def profile(self, owner: Owner) -> HnswProfile:
        """Return the profile of an owner's graphs: their own, or the store's."""
        raw = await self._client.execute("HGET", owner.meta, "graph_profile")
        name = raw.decode() if raw else ""
        return cast("HnswProfile", name) if name in PROFILES else self._settings.hnsw_profile

    async def _archived(self, owner: Owner) -> int:
        if not self._archive.is_configured:
            return 0
        return await self._archive.tend(owner, self._clock())

    async def _users(self) -> AsyncIterator[tuple[Owner, Facts, bool]]:
        page: list[Owner] = []
        async for owner in owners(self._client):
            page.append(owner)
            if len(page) == _PAGE:
                for item in await self._facts(page):
                    yield item
                page = []
        for item in await self._facts(page):
            yield item

    async def _facts(self, page: list[Owner]) -> list[tuple[Owner, Facts, bool]]:
        raw = await self._client.pipeline(
            [
                command
                for owner in page
                for command in (
                    ("ZCARD", owner.ids),
                    ("HMGET", owner.meta, *_FACTS, "graph_writes"),
                    ("EXISTS", *owner.graphs),
                )
            ]
        )
        found = []
        for owner, count, meta, keys in zip(page, raw[::3], raw[1::3], raw[2::3], strict=True):
            state, graph, following, profile, moving, written_s, read_s, reindexed, logged = meta
            facts = Facts(
                memories=count,
                index_state=(state or b"").decode(),
                has_graph=graph is not None,
                is_building=following is not None,
                has_leftovers=keys > 0,
                is_moving=moving is not None,
                has_own_profile=profile is not None,
                used_s=max(float(written_s or 0), float(read_s or 0)),
                reindexed=int(reindexed or 0),
            )
            found.append((owner, facts, int(logged or 0) > 0))
        return found

    @contextlib.asynccontextmanager
    async def _lock(self) -> AsyncIterator[bool]:
        """Hold the store's maintenance, and renew it meanwhile; False when another process has it."""
        token = secrets.token_hex(8)
        if not await self._client.execute("SET", MAINTENANCE_LOCK, token, "NX", "PX", _LOCK_MS):
            yield False
            return
        renewing = asyncio.create_task(self._renew(token))
        try:
            yield True
        finally:
            renewing.cancel()
            with contextlib.suppress(RedisMemError):
                await self._client.execute("EVAL", _RELEASE, 1, MAINTENANCE_LOCK, token)

    async def _renew(self, token: str) -> None:
        while True:
            await asyncio.sleep(_LOCK_MS / 3000)
            with contextlib.suppress(RedisMemError):
                await self._client.execute("EVAL", _RENEW, 1, MAINTENANCE_LOCK, token, _LOCK_MS)
