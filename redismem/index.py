"""The only place that makes users' exact indexes, fills them with what was stored before, and parks them.

While an index is being filled, `index_state` of the owner's meta says so, and every search that reads it is
marked partial: an index that misses memories never passes for a whole one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from redismem.client import Client
from redismem.embed import Embedder
from redismem.errors import RedisMemError, StoreError
from redismem.keys import TAG_SEPARATOR, VECTOR_FIELDS, Owner
from redismem.lualib import Functions
from redismem.query import index_schema

logger = logging.getLogger(__name__)

#: memories listed by one call
_SLICE = 500

#: memories indexed again by one call, and by one of a refresh, where two indexes take them: holds Redis for
#: 2 ms at most, and reads go between
_FILLED, _REFRESHED = 20, 12

#: share and number of memories indexed anew from which an index is refreshed
_WORN_SHARE, _WORN_FEW = 0.1, 8

#: how often a refresh is tried, where memories turn out not to be listed
_MAX_REFRESHES = 2

#: a refresh that was begun so long ago has died
_REFRESH_MS = 600_000

#: an index that is dropped again and again while it is filled
_MAX_FILLS = 5


async def all_ids(client: Client, owner: Owner) -> list[str]:
    """Return every id of an owner, oldest first. Cost: one round trip, 0.1 ms per 1,000."""
    return [raw.decode("utf-8", "replace") for raw in await client.execute("ZRANGE", owner.ids, 0, -1)]


def slices(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield ids in parts of a size."""
    for first in range(0, len(ids), size):
        yield ids[first : first + size]


def is_worn(reindexed: int, memories: int) -> bool:
    """Return whether an index is to be refreshed: a tenth of its memories was indexed anew, and a few."""
    return reindexed > _WORN_FEW + _WORN_SHARE * memories


def is_missing_index(error: StoreError) -> bool:
    """Return whether RediSearch does not know the index; 2.10 and 8.x word it differently."""
    text = error.message.lower()
    return any(words in text for words in ("no such index", "unknown index", "index not found"))


class Indexes:
    """Makes, fills and parks indexes; fills a user's once at a time, however many ask."""

    def __init__(self, functions: Functions, embedder: Embedder) -> None:
        self._functions = functions
        self._embedder = embedder
        self._fills: dict[Owner, asyncio.Task[None]] = {}

    async def open(self, owner: Owner) -> bool:
        """Make the exact index of an owner unless it is there; return whether it is complete.

        One that is not is filled in the background. Cost: two round trips, 0.3 ms.
        """
        if await self._opened(owner) == "OK":
            return True
        self._fill(owner)
        return False

    async def complete(self, owner: Owner, within_s: float | None) -> bool:
        """Make an owner's index, fill it, and wait for that; return whether it is complete.

        Memories that another service wrote and `redismem reembed` has not seen are not filled in.

        Args:
            within_s: how long to wait, None for as long as it takes; filling goes on in the background.

        Cost: 13 us a memory, in slices of 500 that hold Redis for under 9 ms.
        """
        if await self.open(owner):
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.shield(self._fill(owner))
        raw = await self._functions.client.execute("HMGET", owner.meta, "index", "index_state")
        return raw[0] is not None and raw[1] is None

    async def park(self, owner: Owner, idle_before_s: float) -> bool:
        """Drop the index of an owner who was not read or written since; return whether it was dropped.

        Args:
            idle_before_s: epoch seconds.
        """
        outcome = await self._functions.call("rm_chill_v1", [owner.meta, *owner.graphs], repr(idle_before_s))
        return bool(outcome == b"OK")

    async def refresh(self, owner: Owner) -> bool:
        """Make the owner's index anew, beside the one that serves, if it is worn; return whether it was made.

        RediSearch 2.10 takes words for more frequent than they are in a worn index (lua/maintain.lua tells
        why): with every memory indexed twice, keyword recall@20 fell from 0.65 to 0.36.

        Cost: one round trip; 0.11 ms a memory when it is made anew, because both indexes take it, in slices
        of 100 that hold Redis for about 10 ms.
        """
        raw, count = await self._functions.client.pipeline(
            [
                ("HMGET", owner.meta, "reindexed", "index", "vector_field", "dim"),
                ("ZCARD", owner.ids),
            ]
        )
        reindexed, index, field, dim = raw
        if not (reindexed and index and is_worn(int(reindexed), count)):
            return False
        for _ in range(_MAX_REFRESHES):
            outcome = await self._refreshed(owner, index, field, int(dim), int(reindexed))
            if outcome != b"SHORT":
                break
            await self.adopt(owner)  # what other services wrote is in no list yet
        return bool(outcome == b"OK")

    async def _refreshed(self, owner: Owner, index: bytes, field: bytes, dim: int, reindexed: int) -> bytes:
        name = field.decode()
        again = index.decode() == owner.physical_index(name)
        made = owner.physical_index(name, again=again)
        schema = index_schema(owner, name, dim, again=again)
        head = int(time.time() * 1000), _REFRESH_MS
        word: bytes = await self._functions.call("rm_refresh_begin_v1", [made, owner.meta], *head, *schema)
        if word in (b"GONE", b"BUSY"):
            return word
        for part in slices(await all_ids(self._functions.client, owner), _REFRESHED):
            await self._functions.call("rm_reindex_v1", [owner.ids], owner.memory_prefix, *part)
        keys = owner.index, made, owner.meta, owner.searches
        outcome: bytes = await self._functions.call("rm_refresh_end_v1", keys, word, reindexed)
        return outcome

    async def adopt(self, owner: Owner) -> None:
        """List what other services wrote: whatever makes something of all memories walks the list of ids.

        Cost: a round trip per 500 memories.
        """
        offset, found = 0, _SLICE
        while found == _SLICE:
            _, found, _ = await self._functions.call(
                "rm_adopt_v1", [owner.index, owner.ids, owner.meta], owner.memory_prefix, offset, _SLICE
            )
            offset += found

    async def extend(self, owner: Owner) -> None:
        """Let the owner's index know topics; one that was made before there were any does not.

        Redis scans its keys then, in the background and once an index.
        """
        info = await self._functions.client.execute("FT.INFO", owner.index)
        facts = dict(zip(info[::2], info[1::2], strict=True))
        if not any(b"cluster" in attribute for attribute in facts[b"attributes"]):
            tag = ("TAG", "SEPARATOR", TAG_SEPARATOR, "CASESENSITIVE")
            await self._functions.client.execute("FT.ALTER", owner.index, "SCHEMA", "ADD", "cluster", *tag)

    async def close(self) -> None:
        """Stop filling; whoever reads next goes on."""
        for task in self._fills.values():
            task.cancel()
        await asyncio.gather(*self._fills.values(), return_exceptions=True)

    async def _opened(self, owner: Owner, function: str = "rm_open_v1") -> str:
        state = b"STALE"
        while state == b"STALE":  # moved to another embedder since it was looked at
            state = await self._opened_as_read(owner, function)
        return state.decode()

    async def _opened_as_read(self, owner: Owner, function: str) -> bytes:
        field, name, dim = VECTOR_FIELDS[0], self._embedder.name, self._embedder.dim
        raw = await self._functions.client.execute("HMGET", owner.meta, "vector_field", "embedder", "dim")
        if all(raw):
            field, name, dim = raw[0].decode(), raw[1].decode(), int(raw[2])
        state: bytes = await self._functions.call(
            function,
            [owner.index, owner.physical_index(field), owner.meta, owner.ids],
            *(int(time.time() * 1000), name, dim, field),
            *index_schema(owner, field, dim),
        )
        return state

    def _fill(self, owner: Owner) -> asyncio.Task[None]:
        task = self._fills.get(owner)
        if task is None:
            task = self._fills[owner] = asyncio.create_task(self._filled(owner))
            task.add_done_callback(lambda _: self._fills.pop(owner, None))
        return task

    async def _filled(self, owner: Owner) -> None:
        try:
            for _ in range(_MAX_FILLS):
                state = await self._opened(owner, "rm_reopen_v1")
                if state in ("OK", "GONE"):
                    return
                # newest first: what is asked for meanwhile is mostly about lately
                ids = (await all_ids(self._functions.client, owner))[::-1]
                for part in slices(ids, _FILLED):
                    await self._functions.call("rm_reindex_v1", [owner.ids], owner.memory_prefix, *part)
                await self._functions.call("rm_filled_v1", [owner.meta], state)
        except RedisMemError as exc:
            logger.warning("an index is not complete, the next search goes on: %s", exc)
