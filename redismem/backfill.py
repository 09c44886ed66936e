"""The only place that gives vectors to memories that are stored without one.

Three ways lead here: `?wait=false`, a changed turn whose successor lost its vector, a record that
another service wrote. A missing vector is the durable mark of work to do; this queue is only its
fast path, and what a crash loses is found again by `redismem reembed`. A write that overtakes an
embedding wins: `rm_embed` compares the content the vector was made from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from contextvars import Context

from redismem.codec import vector_bytes
from redismem.embed import Embedder
from redismem.errors import Unavailable
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.vectors import read_turns, turn_vectors

logger = logging.getLogger(__name__)

#: memories embedded and written together; keeps one Function call under 5 ms
SLICE = 64

#: a memory that changes this often while it is embedded waits for the next sweep
MAX_TRIES = 5

#: ids in the queue; more are left to `redismem reembed`
MAX_QUEUED = 100_000

_BACK_OFF_S = 1.0


class Backfill:
    """Embeds in the background, one owner's slice at a time."""

    def __init__(self, functions: Functions, embedder: Embedder) -> None:
        self._functions = functions
        self._embedder = embedder
        self._queued: dict[Owner, dict[str, None]] = {}
        self._size = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    def add(self, owner: Owner, ids: Sequence[str]) -> None:
        """Queue memories; returns at once."""
        queue = self._queued.setdefault(owner, {})
        before = len(queue)
        queue.update(dict.fromkeys(ids[: MAX_QUEUED - self._size]))
        self._size += len(queue) - before
        if not queue:
            del self._queued[owner]
            return
        self._idle.clear()
        self._wake.set()
        if self._task is None:
            # it outlives the request that happens to be the first
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def embed_now(self, owner: Owner, ids: Sequence[str], *, urgent: bool = False) -> list[str]:
        """Embed and store the vectors of `ids`; return those that still have none.

        Gone memories are not in the result. Cost: two round trips a slice of 64, more on conflicts.

        Raises:
            EmbedderUnavailable, RedisUnavailable: some or all are still without a vector.
        """
        left: list[str] = []
        for first in range(0, len(ids), SLICE):
            todo: list[str] = list(ids[first : first + SLICE])
            for _ in range(MAX_TRIES):
                todo = await self._embed_slice(owner, todo, urgent=urgent)
                if not todo:
                    break
            left.extend(todo)
        return left

    async def _embed_slice(self, owner: Owner, ids: list[str], *, urgent: bool) -> list[str]:
        rows = await read_turns(self._functions, owner, ids)
        if not rows:
            return []
        vectors = await turn_vectors(self._embedder, [row.turn for row in rows], urgent=urgent)
        todo, stale = list(zip(rows, vectors, strict=True)), []
        while todo:  # a call takes a few vectors of a large owner, and leaves the rest waiting
            words = await self._functions.call(
                "rm_embed_v1",
                [owner.meta, owner.ids, owner.turns, *owner.graphs, *owner.derived],
                *(owner.memory_prefix, int(time.time() * 1000), self._embedder.name, self._embedder.dim),
                *(part for row, vector in todo for part in (*row.key, vector_bytes(vector))),
            )
            stale += [row.id for (row, _), word in zip(todo, words, strict=True) if word == b"STALE"]
            todo = [item for item, word in zip(todo, words, strict=True) if word == b"WAITING"]
        return stale

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            owner, ids = self._taken()
            try:
                await self.embed_now(owner, ids)
            except Unavailable as exc:
                logger.warning("embedding %d memories later: %s", len(ids), exc)
                self.add(owner, ids)
                await asyncio.sleep(_BACK_OFF_S)
            except Exception:  # the queue must outlive whatever an embedder may raise
                logger.exception("%d memories stay without a vector until `redismem reembed`", len(ids))
            if not self._queued:
                self._wake.clear()
                self._idle.set()

    def _taken(self) -> tuple[Owner, list[str]]:
        # taken out before embedding: an id queued again meanwhile has changed again
        owner, queue = next(iter(self._queued.items()))
        ids = list(queue)[:SLICE]
        for memory_id in ids:
            del queue[memory_id]
        self._size -= len(ids)
        if not queue:
            del self._queued[owner]
        return owner, ids

    async def drained(self, timeout_s: float) -> bool:
        """Wait until the queue is empty; False when time ran out."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self._queued

    async def close(self, timeout_s: float = 5.0) -> None:
        """Embed what is queued, within `timeout_s`, then stop."""
        await self.drained(timeout_s)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
