"""The only place that decides whether a Redis server can hold our store, and what the store remembers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from redismem.client import Client
from redismem.embed import Embedder
from redismem.errors import EmbedderMismatch, Misconfigured
from redismem.keys import META_PATTERN, STORE, Owner

#: the first whose hash fields expire one by one: cached searches, and the leases of processes
MIN_REDIS = (7, 4)

#: Redis below has an HNSW leak and a Lua use-after-free; fine to develop on
SAFE_REDIS = (8, 2, 6)

#: the first with INDEXMISSING, FLOAT16 and BM25STD
MIN_SEARCH = 21_000

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
