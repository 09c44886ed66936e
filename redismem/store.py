"""The only place that decides whether a Redis server can hold our store, and what the store remembers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from redismem.client import Client
from redismem.embed import Embedder
from redismem.errors import EmbedderMismatch, InvalidInput, Misconfigured
from redismem.keys import META_PATTERN, STORE, Owner
from redismem.types import UserItem

#: the first whose hash fields expire one by one: cached searches, and the leases of processes
MIN_REDIS = (7, 4)

#: Redis below has an HNSW leak and a Lua use-after-free; fine to develop on
SAFE_REDIS = (8, 2, 6)

#: the first with INDEXMISSING, FLOAT16 and BM25STD
MIN_SEARCH = 21_000

#: where a page of users ended: the SCAN it was in, that SCAN's end, and the tag of the last user
USERS_CURSOR = r"^[0-9]{1,20}~[0-9]{1,20}~[A-Za-z0-9%._/-]*\Z"

#: keys of a round trip and round trips of a page: about 20 ms
_SCAN_KEYS, _MAX_SCANS = 1000, 40

#: version of the key schema; a higher one in the store was written by a newer redismem
SCHEMA = 1


@dataclass(frozen=True)
class ServerFacts:
    """What a Redis server is."""

    version: tuple[int, ...]
    search: int | None
    cluster: bool
    #: it has vector sets, which hold the graphs of large users
    vector_sets: bool = True


async def server_facts(client: Client) -> ServerFacts:
    """Return version and modules of the server. Cost: two round trips."""
    lines = (await client.execute("INFO", "server", "cluster")).decode().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    modules = {}
    for row in await client.execute("MODULE", "LIST"):
        module = dict(zip(row[::2], row[1::2], strict=True))
        modules[module[b"name"]] = int(module[b"ver"])
    search = modules.get(b"search")
    version = tuple(int(part) for part in fields["redis_version"].split(".")[:3])
    return ServerFacts(version, search, fields.get("cluster_enabled") == "1", b"vectorset" in modules)


def server_problem(facts: ServerFacts) -> str | None:
    """Return why this server cannot hold a store, with the remedy; None when it can."""
    shown = ".".join(map(str, facts.version))
    if facts.version < MIN_REDIS:
        return f"Redis {shown} is too old: use 8.2.6 or newer (7.4 at least) with the search module."
    if facts.search is None:
        return (
            "this Redis has no search module: use Redis 8, Redis Stack 7.4, "
            "or load redisearch.so with --loadmodule."
        )
    if facts.search < MIN_SEARCH:
        return f"the search module {facts.search} is too old: use 2.10 or newer (Redis Stack 7.4, Redis 8)."
    if facts.cluster:
        return "this Redis runs in cluster mode, which redismem does not speak yet: use one node."
    return None


async def check_server(client: Client) -> None:
    """Raise Misconfigured when the server cannot hold a store."""
    if problem := server_problem(await server_facts(client)):
        raise Misconfigured(problem)


async def claim(client: Client, embedder: Embedder) -> None:
    """Remember the embedder of a new store; compare it with that of an old one.

    Raises:
        EmbedderMismatch: the store's vectors come from another embedder.
        Misconfigured: the store was written by a newer redismem.
    """
    await client.pipeline(
        [
            ("HSETNX", STORE, "schema", SCHEMA),
            ("HSETNX", STORE, "embedder", embedder.name),
            ("HSETNX", STORE, "dim", embedder.dim),
        ]
    )
    schema, name, dim = await client.execute("HMGET", STORE, "schema", "embedder", "dim")
    if int(schema) > SCHEMA:
        raise Misconfigured(
            f"the store has schema {int(schema)}, this redismem knows {SCHEMA}: upgrade redismem."
        )
    if (name.decode(), int(dim)) != (embedder.name, embedder.dim):
        raise EmbedderMismatch(
            f"The store's vectors are of embedder {name.decode()} ({int(dim)} dimensions), this process "
            f"uses {embedder.name} ({embedder.dim}). Start with the old embedder, or move the store to the "
            "new one with `redismem reembed`; services with the old embedder may go on serving meanwhile.",
            field="embedder",
        )


async def owners(client: Client) -> AsyncIterator[Owner]:
    """Yield every owner who has memories. Cost: a SCAN of the keyspace, 1,000 keys a round trip."""
    cursor, seen = b"0", set()
    while True:
        cursor, keys = await client.execute(
            "SCAN", cursor, "MATCH", META_PATTERN, "COUNT", 1000, "TYPE", "hash"
        )
        for key in keys:
            if key not in seen:
                seen.add(key)
                yield Owner.from_meta_key(key.decode())
        if cursor in (b"0", 0):
            return


async def owners_page(
    client: Client,
    namespace: str,
    keep: Callable[[Owner], bool],
    *,
    limit: int,
    cursor: str | None = None,
) -> tuple[list[Owner], str | None]:
    """Return up to `limit` owners of a namespace that `keep` lets through, and where to go on.

    A page may hold fewer, even none, and still have a cursor; the last page has none. Who has memories from
    the first page to the last is in one of them, or, where keys came and went meanwhile, in two.

    SCAN stops where it wants, and a page in the middle of what it found. The next page makes the same SCAN
    again: when that ends where it ended before, it went over the same part of the keyspace, and the owners up
    to the last one, in order of their tags, are known.

    Raises:
        InvalidInput: the cursor is not one of ours.

    Cost: a round trip per 1,000 keys of the store, at most 40 a page.
    """
    start, end, last = (cursor or "0~0~").split("~")
    if max(int(start), int(end)) >= 2**64:
        raise InvalidInput("`cursor` is not one that this service gave", field="cursor")
    found: dict[Owner, None] = {}
    for _ in range(_MAX_SCANS):
        raw_end, keys = await client.execute(
            "SCAN", start, "MATCH", META_PATTERN, "COUNT", _SCAN_KEYS, "TYPE", "hash"
        )
        known = last if int(raw_end) == int(end) else ""
        end, last = str(int(raw_end)), known
        for owner in sorted((Owner.from_meta_key(key.decode()) for key in keys), key=lambda one: one.tag):
            if owner.tag <= known or owner.namespace != namespace or not keep(owner):
                continue
            if len(found) == limit and owner not in found:
                return list(found), f"{start}~{end}~{last}"
            found[owner], last = None, owner.tag
        if end == "0":
            return list(found), None
        start, last = end, ""
    return list(found), f"{start}~0~"


async def user_items(client: Client, owners: Sequence[Owner]) -> list[UserItem]:
    """Return what a listing tells of owners, in order. Cost: one round trip."""
    raw = await client.pipeline(
        [
            command
            for owner in owners
            for command in (("ZCARD", owner.ids), ("HMGET", owner.meta, "last_activity", "last_read"))
        ]
    )
    items = []
    for owner, memories, moments in zip(owners, raw[::2], raw[1::2], strict=True):
        active_s = max(float(moment or 0) for moment in moments)
        active = datetime.fromtimestamp(active_s, UTC) if active_s else None
        items.append(
            UserItem(user=owner.user, namespace=owner.namespace, memories=memories, last_active=active)
        )
    return items
