"""Warms users up: touches their indexes and loads what they used lately into L1.

At the start of a service the most recently active users come first; readiness waits for them, so that
the first questions after a deploy are not the slow ones.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import numpy as np

from redismem.client import Client
from redismem.codec import unit, vector_bytes
from redismem.coherence import Coherence
from redismem.embed import Embedder
from redismem.errors import RedisMemError
from redismem.index import Indexes
from redismem.keys import Owner
from redismem.store import owners
from redismem.tiers import Tiers

logger = logging.getLogger(__name__)

#: hot memories of a user that are loaded, and newest ones
HOT, NEWEST = 100, 20

#: users whose sessions begin that are warmed at once
MOST_BEGINNING = 64

#: seconds that readiness waits for warming at most: a slow start beats none
PATIENCE_S = 10.0

#: users warmed side by side
_LANES = 4

#: users whose last use is read in one round trip
_PAGE = 500


class Warmth(msgspec.Struct, kw_only=True):
    """How far warming is: users warm, of how many."""

    done: int = 0
    of: int = 0


class Warmer:
    """Warms users of one store in one process."""

    def __init__(
        self,
        client: Client,
        indexes: Indexes,
        tiers: Tiers,
        coherence: Coherence,
        embedder: Embedder,
        users: int,
    ) -> None:
        self._client = client
        self._indexes = indexes
        self._tiers = tiers
        self._coherence = coherence
        self._users = users
        # a direction that no text has: near to all alike
        self._vector = vector_bytes(unit(np.ones(embedder.dim)))
        self.warmth = Warmth()
        self.is_ready = True
        self._beginning: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Warm the most recently active users; `is_ready` tells when that is done, or took too long."""
        self.is_ready = False
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._coherence.lived()
                recent = await self._recent()
                self.warmth = Warmth(of=len(recent))
                queue = iter(recent)
                await asyncio.gather(*(self._lane(queue) for _ in range(_LANES)))
        except (TimeoutError, RedisMemError) as exc:
            logger.warning("serving before all is warm: %s", exc or "it takes too long")
        finally:
            self.is_ready = True

    async def _lane(self, queue: Iterator[Owner]) -> None:
        for owner in queue:
            await self.warm(owner)
            self.warmth.done += 1

    def begin(self, owner: Owner) -> None:
        """Warm an owner whose session begins, in the background; a parked index is made again."""
        if owner.tag in self._beginning or len(self._beginning) >= MOST_BEGINNING:
            return
        task = asyncio.create_task(self._begun(owner))
        self._beginning[owner.tag] = task
        task.add_done_callback(lambda _: self._beginning.pop(owner.tag, None))

    async def _begun(self, owner: Owner) -> None:
        try:
            await self.warm(owner, unpark=True)
        except RedisMemError as exc:
            logger.debug("not warmed: %s", exc)

    async def close(self) -> None:
        """Stop warming."""
        tasks = list(self._beginning.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def warm(self, owner: Owner, *, unpark: bool = False) -> int:
        """Touch the index of an owner; load hot, important and new memories into L1; return how many.

        An index that is being filled is waited for. Cost: three round trips.

        Args:
            unpark: make a parked index again; else it stays parked.
        """
        state = await self._client.execute("HGET", owner.meta, "index_state")
        if state == b"cold" and not unpark:
            return 0
        if state is not None:
            await self._indexes.complete(owner, None)
        touch = ("FT.SEARCH", owner.index, "*=>[KNN 1 @embedding $v AS d]", "PARAMS", 2, "v", self._vector)
        hot = ("ZREVRANGE", owner.hot, 0, HOT - 1)
        newest = ("ZREVRANGE", owner.ids, 0, NEWEST - 1)
        important = ("HGET", owner.profile, "important_memory_ids")
        try:
            raw_hot, raw_newest, raw_important, _ = await self._client.pipeline(
                [hot, newest, important, (*touch, "NOCONTENT", "LIMIT", 0, 1, "DIALECT", 2)]
            )
        except RedisMemError as exc:  # no index, or vectors of another embedder: its next reader mends that
            logger.debug("not warmed: %s", exc)
            return 0
        ids = [raw.decode("utf-8", "replace") for raw in (*raw_hot, *raw_newest)]
        with suppress(msgspec.MsgspecError):
            ids += msgspec.json.decode(raw_important or b"[]", type=list[str])
        return await self._tiers.warm(owner, list(dict.fromkeys(ids)))

    async def _recent(self) -> list[Owner]:
        """Return the most recently active users, the latest first."""
        known, page = list[tuple[float, str, Owner]](), list[Owner]()
        async for owner in owners(self._client):
            page.append(owner)
            if len(page) == _PAGE:
                known += await self._used(page)
                page = []
        known += await self._used(page)
        return [owner for _, _, owner in heapq.nlargest(self._users, known)]

    async def _used(self, page: list[Owner]) -> list[tuple[float, str, Owner]]:
        rows = await self._client.pipeline(
            [("HMGET", owner.meta, "last_activity", "last_read") for owner in page]
        )
        moments = [max(float(raw or 0) for raw in row) for row in rows]
        return [(moment, owner.tag, owner) for moment, owner in zip(moments, page, strict=True)]
