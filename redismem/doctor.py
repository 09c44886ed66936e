"""Examines a store and what it stands on; changes nothing of its owners unless asked to repair.

A check whose ground is missing (no Redis, no embedder) is left out: the finding that says so stands above.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from secrets import token_hex
from typing import Any, Literal

from msgspec import Struct

from redismem.archive import Archive
from redismem.client import Client
from redismem.embed import Embedder, open_embedder
from redismem.errors import Misconfigured, RedisMemError, StoreError
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.keys import STORE, VECTOR_FIELDS, Owner
from redismem.lualib import Functions, load_libraries, loaded_versions, shipped_libraries
from redismem.query import index_schema
from redismem.service import assembled, open_client
from redismem.settings import Settings
from redismem.store import SAFE_REDIS, owners, server_facts, server_problem
from redismem.types import MemoryInput, SearchRequest

Status = Literal["ok", "warn", "fail"]

#: owners whose index is examined; five round trips each, so a second or two in all
MAX_OWNERS = 1000

#: namespace of the round trip's throw-away user
DOCTOR_NAMESPACE = "redismem-doctor"

#: problems that a finding names; the rest are counted
_NAMED = 5

#: seconds that a due job may wait before somebody should look
_LATE_S = 300

#: seconds in which the push connection of the round trip should stand
_LISTEN_S = 2.0

_REEMBED = "run `redismem reembed`"
_REPAIR = "run `redismem doctor --repair`"


class Finding(Struct, kw_only=True, omit_defaults=True):
    """What one check saw, and what to do about it."""

    name: str
    status: Status
    seen: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is wrong with one owner's index."""

    status: Status
    text: str
    remedy: str


async def examine(settings: Settings, *, repair: bool = False) -> list[Finding]:
    """Return what the checks found, in the order they build on each other.

    Args:
        repair: rebuild indexes that are missing, incomplete or of another schema.

    Cost: the embedder's start, five round trips an owner, and 13 us a memory to repair.
    """
    found: list[Finding] = []
    embedder: Embedder | None = None
    async with AsyncExitStack() as stack:
        with _failing(found, "embedder", "see the message"):
            embedder = await open_embedder(settings)
            stack.push_async_callback(embedder.close)
            found.append(await _embedding(embedder))
        client: Client | None = None
        with _failing(found, "redis", "start Redis, or correct REDISMEM_REDIS_URL or REDISMEM_DATA_DIR"):
            client = await stack.enter_async_context(open_client(settings))
            found.append(await _answer(client, settings))
        if client is not None and found[-1].status == "ok":
            await _examine_store(found, client, embedder, settings, repair=repair)
    return found


async def _examine_store(
    found: list[Finding], client: Client, embedder: Embedder | None, settings: Settings, *, repair: bool
) -> None:
    with _failing(found, "server", "see the message"):
        found.append(await _server(client))
    if found[-1].status == "fail":
        return
    with _failing(found, "persistence", "see the message"):
        found += await _persistence(client)
    newer = False
    with _failing(found, "functions", "grant this user FUNCTION LIST"):
        functions = await _libraries(client)
        newer = functions.status == "warn" and "newer" in functions.seen
        found.append(functions)
    with _failing(found, "store", "see the message"):
        found.append(await _remembered(client, embedder))
    if settings.archive_url and embedder is not None:
        with _failing(found, "archive", "make REDISMEM_ARCHIVE_URL reachable, or correct it"):
            await Archive(Functions(client), settings, embedder).check()
            found.append(Finding(name="archive", status="ok", seen="it can be reached and is this store's"))
    if not newer:
        with _failing(found, "jobs", "see the message"):
            found.append(await _queue(client))
    with _failing(found, "indexes", _REPAIR):
        if repair and (newer or embedder is None):
            reason = "a newer redismem uses this store: upgrade" if newer else "it needs the embedder"
            found.append(Finding(name="repair", status="fail", seen="not done", remedy=reason))
        found += await _indexes(client, embedder, repair=repair and not newer)
    if embedder is not None:
        with _failing(found, "round trip", "see the message"):
            found.append(await _round_trip(client, embedder, settings))


@contextmanager
def _failing(found: list[Finding], name: str, remedy: str) -> Iterator[None]:
    """Turn an error of the block into a finding."""
    try:
        yield
    except RedisMemError as exc:
        seen = f"{exc.message} {exc.detail}".strip()
        found.append(Finding(name=name, status="fail", seen=seen, remedy=remedy))


async def _embedding(embedder: Embedder) -> Finding:
    started = time.perf_counter()
    rows = await embedder.embed(["Which food is she allergic to?"])
    seen = f"{embedder.name}, {rows.shape[1]} dimensions, {_ms_since(started)} for a short query"
    return Finding(name="embedder", status="ok", seen=seen)


async def _answer(client: Client, settings: Settings) -> Finding:
    started = time.perf_counter()
    await client.execute("PING")
    where = "REDISMEM_REDIS_URL" if settings.redis_url else f"embedded in {settings.data_dir}"
    return Finding(name="redis", status="ok", seen=f"{where}, first answer in {_ms_since(started)}")


async def _server(client: Client) -> Finding:
    facts = await server_facts(client)
    if problem := server_problem(facts):
        what, _, remedy = problem.partition(": ")
        return Finding(name="server", status="fail", seen=what, remedy=remedy)
    search = facts.search or 0
    seen = f"Redis {_dotted(facts.version)}, search {search // 10_000}.{search // 100 % 100}.{search % 100}"
    if not facts.vector_sets:
        remedy = "searches of large users stay exact and slow; Redis 8 has vector sets"
        return Finding(name="server", status="warn", seen=f"{seen}, no vector sets", remedy=remedy)
    if facts.version < SAFE_REDIS:
        remedy = f"fine to develop on; run {_dotted(SAFE_REDIS)} or newer in production"
        return Finding(name="server", status="warn", seen=seen, remedy=remedy)
    return Finding(name="server", status="ok", seen=seen)


async def _persistence(client: Client) -> list[Finding]:
    lines = (await client.execute("INFO", "everything")).decode().splitlines()
    info = dict(line.split(":", 1) for line in lines if ":" in line)
    try:
        save = (await client.execute("CONFIG", "GET", "save"))[1].decode()
    except (StoreError, Misconfigured, IndexError):  # managed servers hide CONFIG, ACLs may forbid it
        save = None
    return [_durability(info, save), _eviction(info)]


def _durability(info: Mapping[str, str], save: str | None) -> Finding:
    name = "persistence"
    if "err" in (info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")):
        remedy = "make room on its disk; the reason is in Redis's log"
        return Finding(name=name, status="fail", seen="Redis cannot write to its disk", remedy=remedy)
    if info.get("aof_enabled") == "1":
        return Finding(name=name, status="ok", seen="append-only file")
    if save:
        remedy = "set `appendonly yes`, or accept to lose what came after the last snapshot"
        return Finding(name=name, status="warn", seen=f"snapshots only (save {save})", remedy=remedy)
    if save is None:
        remedy = "ask the provider for append-only persistence"
        return Finding(name=name, status="warn", seen="no append-only file; CONFIG is hidden", remedy=remedy)
    remedy = "set `appendonly yes`"
    return Finding(name=name, status="warn", seen="off: a restart loses every memory", remedy=remedy)


def _eviction(info: Mapping[str, str]) -> Finding:
    limit, policy = int(info.get("maxmemory", 0)), info.get("maxmemory_policy", "noeviction")
    seen = f"{policy}, maxmemory {limit // 2**20} MB" if limit else f"{policy}, no maxmemory"
    if not policy.startswith("allkeys-"):
        return Finding(name="eviction", status="ok", seen=seen)
    when = "drops memories when full" if limit else "would drop memories under a maxmemory"
    remedy = "set `maxmemory-policy noeviction` or one of volatile-*"
    return Finding(name="eviction", status="warn", seen=f"{seen}: {when}", remedy=remedy)


async def _libraries(client: Client) -> Finding:
    loaded = await loaded_versions(client)
    shown, outdated, newer = [], False, False
    for library in shipped_libraries():
        version = loaded.get(library.name)
        short = library.name.removeprefix("redismem_")
        if version is None or version < library.version:
            outdated = True
            shown.append(f"{short} {'missing' if version is None else version} (here {library.version})")
        elif version > library.version:
            newer = True
            shown.append(f"{short} {version} (newer than {library.version} here)")
        else:
            shown.append(f"{short} {version}")
    seen = ", ".join(shown)
    if newer:
        return Finding(name="functions", status="warn", seen=seen, remedy="upgrade redismem")
    if outdated:
        remedy = "start redismem: it loads them"
        return Finding(name="functions", status="warn", seen=seen, remedy=remedy)
    return Finding(name="functions", status="ok", seen=seen)


async def _remembered(client: Client, embedder: Embedder | None) -> Finding:
    name, dim = await client.execute("HMGET", STORE, "embedder", "dim")
    if name is None:
        return Finding(name="store", status="ok", seen="empty: takes the embedder of the first start")
    seen = f"vectors of {name.decode()}, {int(dim)} dimensions"
    if embedder is not None and (name.decode(), int(dim)) != (embedder.name, embedder.dim):
        remedy = f"configure that embedder, or {_REEMBED}"
        return Finding(name="store", status="fail", seen=f"{seen}; here {embedder.name}", remedy=remedy)
    return Finding(name="store", status="ok", seen=seen)


async def _queue(client: Client) -> Finding:
    counts = await Jobs(Functions(client)).counts()
    seen = f"{counts.waiting:,} wait, {counts.started:,} are being done, {counts.dead:,} failed too often"
    if counts.dead:
        remedy = "look at them with `redismem jobs`, then `redismem jobs retry`"
    elif counts.late_s > _LATE_S:
        late = f"the oldest is {counts.late_s:,.0f} s late"
        remedy = f"{late}: run `redismem worker`, or `serve` with REDISMEM_WORKER=1"
    else:
        return Finding(name="jobs", status="ok", seen=seen)
    return Finding(name="jobs", status="warn", seen=seen, remedy=remedy)


async def _indexes(client: Client, embedder: Embedder | None, *, repair: bool) -> list[Finding]:
    examined = rebuilt = 0
    shapes = _Shapes(client)
    problems: list[tuple[Owner, _Problem]] = []
    beyond = ""
    async for owner in owners(client):
        if examined == MAX_OWNERS:
            beyond = ", others were not"
            break
        examined += 1
        problem = await _index_problem(client, owner, shapes)
        if problem:  # unless a write between two commands explains it
            problem = await _index_problem(client, owner, shapes)
        if problem and repair and embedder is not None and problem.remedy == _REPAIR:
            await _rebuild(client, owner, embedder)
            rebuilt += 1
            problem = await _index_problem(client, owner, shapes)
        if problem:
            problems.append((owner, problem))
    found = []
    for remedy in dict.fromkeys(problem.remedy for _, problem in problems):
        group = [(owner, problem) for owner, problem in problems if problem.remedy == remedy]
        named = [f"{_shown(owner)}: {problem.text}" for owner, problem in group[:_NAMED]]
        if len(group) > _NAMED:
            named.append(f"and {len(group) - _NAMED:,} more users")
        status = group[0][1].status
        found.append(Finding(name="indexes", status=status, seen="; ".join(named), remedy=remedy))
    seen = f"{examined - len(problems):,} of {examined:,} users examined are in order{beyond}"
    seen += f"; {rebuilt:,} rebuilt" if rebuilt else ""
    return [Finding(name="indexes", status="ok", seen=seen), *found]


async def _index_problem(client: Client, owner: Owner, shapes: _Shapes) -> _Problem | None:
    if await client.execute("HGET", owner.meta, "index_state") == b"cold":
        return None  # its next reader or writer makes it
    stored = await client.execute("ZCARD", owner.ids)
    info = await _index_info(client, owner.index)
    if fault := await _index_fault(client, owner, info, stored, shapes):
        return _Problem("fail", fault, _REPAIR)
    if following := await client.execute("HGET", owner.meta, "next_embedder"):
        return _Problem("warn", f"the move to {following.decode()} did not end", _REEMBED)
    query = ("ismissing(@embedding)", "LIMIT", 0, 0, "DIALECT", 2)
    without = (await client.execute("FT.SEARCH", owner.index, *query))[0]
    foreign = int(info["num_docs"]) - stored
    if without or foreign > 0:
        text = f"{without:,} memories without a vector, {foreign:,} that another service wrote"
        return _Problem("warn", text, _REEMBED)
    return None


async def _index_fault(
    client: Client, owner: Owner, info: Mapping[str, Any], stored: int, shapes: _Shapes
) -> str | None:
    raw = await client.execute("HMGET", owner.meta, "index", "dim", "vector_field")
    if not (info and all(raw)):
        return f"the index of {stored:,} memories is missing"
    if info["index_name"] != raw[0]:
        return f"its alias leads to {info['index_name'].decode()}"
    if _shape(info) != await shapes.wanted(raw[2].decode(), int(raw[1])):
        return "its index has another schema than this redismem makes"
    if int(info["num_docs"]) < stored:
        return f"{int(info['num_docs']):,} of {stored:,} memories are indexed"
    return None


class _Shapes:
    """What FT.INFO says of an index that this redismem makes on this server."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[tuple[str, int], list[Any]] = {}

    async def wanted(self, field: str, dim: int) -> list[Any]:
        """Return the shape of a new index. Cost: makes one and drops it, once for each kind."""
        if (field, dim) not in self._known:
            owner = Owner(token_hex(8), DOCTOR_NAMESPACE)
            index = owner.physical_index(field)
            await self._client.execute("FT.CREATE", *index_schema(owner, field, dim))
            try:
                self._known[field, dim] = _shape(await _index_info(self._client, index))
            finally:
                await self._client.execute("FT.DROPINDEX", index)
        return self._known[field, dim]


def _shape(info: Mapping[str, Any]) -> list[Any]:
    # fields that were added to an index stand last in it
    attributes = sorted(map(repr, info.get("attributes", ())))
    return [info.get("index_options"), attributes, info.get("stopwords_list")]


async def _index_info(client: Client, index: str) -> dict[str, Any]:
    """Return FT.INFO; empty when there is no such index."""
    try:
        flat = await client.execute("FT.INFO", index)
    except StoreError as exc:
        if "index" not in str(exc).lower():
            raise
        return {}
    return {key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


async def _rebuild(client: Client, owner: Owner, embedder: Embedder) -> None:
    named = await client.execute("HGET", owner.meta, "index")
    index = named.decode() if named else owner.physical_index(VECTOR_FIELDS[0])
    if await _index_info(client, index):
        await client.execute("FT.DROPINDEX", index)
    await Indexes(Functions(client), embedder).complete(owner, None)


async def _round_trip(client: Client, embedder: Embedder, settings: Settings) -> Finding:
    """Write, search and delete a memory of a user that nobody else has."""
    await load_libraries(client)
    owner = Owner(token_hex(8), DOCTOR_NAMESPACE)
    request = SearchRequest(text="Where does the doctor keep the stethoscope?", limit=1)
    async with assembled(settings, client, embedder) as service:
        with suppress(TimeoutError):  # a delete would wait for a process that cannot hear it yet
            async with asyncio.timeout(_LISTEN_S):
                await service.coherence.lived()
        try:
            moments = [time.perf_counter()]
            memory = MemoryInput(text="The doctor keeps the stethoscope in the blue cupboard.")
            memory_id = (await service.writer.put(owner, [memory])).memories[0].id or ""
            moments.append(time.perf_counter())
            hits = (await service.search(owner, request)).memories
            moments.append(time.perf_counter())
            await service.writer.delete(owner, memory_id)
            moments.append(time.perf_counter())
            left = (await service.search(owner, request)).memories
        finally:
            await service.writer.forget(owner)
    steps = zip(("write", "search", "delete"), pairwise(moments), strict=True)
    times = [f"{step} {(after - before) * 1000:.1f} ms" for step, (before, after) in steps]
    if [hit.id for hit in hits] != [memory_id] or left:
        seen = "a written memory was not found" if not hits else "a deleted memory was found"
        remedy = "report a defect, with this output"
        return Finding(name="round trip", status="fail", seen=seen, remedy=remedy)
    return Finding(name="round trip", status="ok", seen=", ".join(times))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _shown(owner: Owner) -> str:
    return f"{owner.namespace}/{owner.user}" if owner.namespace else owner.user


def _ms_since(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:.1f} ms"
