"""Moves a store to another embedder, and gives vectors to whatever has none, while it is served.

New vectors are stored beside the old ones and fill an index of their own; then one Function call
points the owner's alias at it. Every step can be repeated: a second run goes on where the first ended.
"""

from __future__ import annotations

from collections.abc import Callable

from redismem.backfill import MAX_TRIES, SLICE, Backfill
from redismem.client import Client
from redismem.codec import vector_bytes
from redismem.embed import Embedder
from redismem.errors import StoreError
from redismem.index import Indexes, all_ids, is_missing_index
from redismem.jobs import Jobs
from redismem.keys import STORE, VECTOR_FIELDS, Owner
from redismem.lualib import Functions
from redismem.query import index_schema
from redismem.store import owners
from redismem.vectors import read_turns, turn_vectors

_WALK = 500
_FILL = 1000

# a user who is forgotten meanwhile must not get a key again
_FRESH = "return redis.call('EXISTS', KEYS[1]) == 1 and redis.call('SADD', KEYS[2], unpack(ARGV))"


class Reembedder:
    """Brings owners to one embedder."""

    def __init__(self, client: Client, functions: Functions, embedder: Embedder) -> None:
        self._client = client
        self._functions = functions
        self._embedder = embedder
        self._backfill = Backfill(functions, embedder)
        self._indexes = Indexes(functions, embedder)

    async def run(self, progress: Callable[[Owner, int], None] | None = None) -> int:
        """Bring every owner of the store to the embedder; return the number of vectors made.

        Raises:
            Unavailable: Redis or the embedder went away; run again to go on.
        """
        made = 0
        async for owner in owners(self._client):
            made += (count := await self.move(owner))
            if progress is not None:
                progress(owner, count)
        await self._client.execute("HSET", STORE, "embedder", self._embedder.name, "dim", self._embedder.dim)
        return made

    async def move(self, owner: Owner) -> int:
        """Bring one owner to the embedder; return the number of vectors made."""
        raw = await self._client.execute("HMGET", owner.meta, "index", "embedder", "vector_field")
        if raw[0] is None:
            return 0
        await self._indexes.adopt(owner)
        made = 0
        if raw[1].decode() != self._embedder.name:
            made = await self._switch(owner, raw[2].decode())
        await self._settle(owner)
        return made + await self.fill(owner)

    async def _switch(self, owner: Owner, old_field: str) -> int:
        field = next(name for name in VECTOR_FIELDS if name != old_field)
        name, dim = self._embedder.name, self._embedder.dim
        index = owner.physical_index(field)
        begun = await self._functions.call(
            "rm_begin_v1", [index, owner.meta], name, 0, *index_schema(owner, field, dim)
        )
        if begun == b"GONE":
            return 0
        made = 0
        # a memory that this run has not staged is in the new index only if an earlier run staged it
        fresh = begun == b"STARTED"
        seen: set[str] = set()
        while todo := [i for i in await self._ids(owner) if i not in seen]:
            seen.update(todo)
            for first in range(0, len(todo), SLICE):
                part = todo[first : first + SLICE]
                staged = await self._client.pipeline(
                    [("HGET", owner.memory(i), "embedder_next") for i in part]
                )
                missing = [i for i, raw in zip(part, staged, strict=True) if fresh or raw != name.encode()]
                made += await self._stage(owner, field, missing)
        await self._functions.call("rm_switch_v1", [owner.index, index, owner.meta], name, dim, field)
        # edges and centroids are of the old vectors
        ids = await self._ids(owner)
        for first in range(0, len(ids), _FILL):
            part = ids[first : first + _FILL]
            await self._client.execute("EVAL", _FRESH, 2, owner.meta, owner.fresh, *part)
        await Jobs(self._functions).queue(owner, "link", "topics")
        return made

    async def _stage(self, owner: Owner, field: str, ids: list[str]) -> int:
        made = 0
        for _ in range(MAX_TRIES):
            if not ids:
                break
            rows = await read_turns(self._functions, owner, ids)
            if not rows:
                break
            vectors = await turn_vectors(self._embedder, [row.turn for row in rows])
            words = await self._functions.call(
                "rm_stage_v1",
                [owner.meta, owner.turns],
                *(owner.memory_prefix, self._embedder.name, self._embedder.dim, field),
                *(
                    part
                    for row, vector in zip(rows, vectors, strict=True)
                    for part in (*row.key, vector_bytes(vector))
                ),
            )
            made += words.count(b"OK")
            ids = [row.id for row, word in zip(rows, words, strict=True) if word == b"STALE"]
        return made

    async def _settle(self, owner: Owner) -> None:
        """Remove what an earlier switch left: the old vectors, then their index."""
        raw = await self._client.execute("HMGET", owner.meta, "vector_field", "next_embedder")
        if raw[1] is None:
            return
        field = raw[0].decode()
        old_field = next(name for name in VECTOR_FIELDS if name != field)
        ids = await self._ids(owner)
        for first in range(0, len(ids), _WALK):
            await self._functions.call(
                "rm_settle_v1",
                [owner.meta],
                *(owner.memory_prefix, field, old_field, self._embedder.name, *ids[first : first + _WALK]),
            )
        for again in (False, True):
            await self._drop(owner.physical_index(old_field, again=again))
        await self._client.execute("HDEL", owner.meta, "next_embedder")

    async def fill(self, owner: Owner) -> int:
        """Give a vector to every memory without one, those of other services included."""
        made, before = 0, -1
        while True:
            try:
                total, *keys = await self._client.execute(
                    *("FT.SEARCH", owner.index, "ismissing(@embedding)", "NOCONTENT"),
                    *("LIMIT", 0, _FILL, "DIALECT", 2),
                )
            except StoreError as exc:
                if is_missing_index(exc):  # the user was forgotten meanwhile
                    return made
                raise
            if not keys or total == before:  # the rest changes too fast, or has no text
                return made
            ids = [key.decode().removeprefix(owner.memory_prefix) for key in keys]
            made += len(ids) - len(await self._backfill.embed_now(owner, ids))
            before = total

    async def _ids(self, owner: Owner) -> list[str]:
        return await all_ids(self._client, owner)

    async def _drop(self, index: str) -> None:
        try:
            await self._client.execute("FT.DROPINDEX", index)
        except StoreError as exc:
            if not is_missing_index(exc):
                raise
