"""The only place that tells Redis which memories were returned to users: the hot set.

A touch must cost the read nothing, so it is counted here and sent once a second, a few at a time: reads go
between. Touches are advisory: those of the last second may be lost with the process, and what Redis refuses
is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import Context

from redismem.client import Argument
from redismem.errors import RedisMemError, Unavailable
from redismem.keys import Owner
from redismem.lualib import Functions

_log = logging.getLogger(__name__)

#: seconds between two flushes, and the longest that closing waits for the last
FLUSH_EVERY_S = 1.0

#: distinct results that wait for a flush, about 0.3 KB each; more are dropped
MAX_PENDING = 100_000

#: ids in one round trip, and so of one owner in one call of rm_touch; holds Redis for about 0.5 ms
BATCH = 100

#: keys, and arguments: four, then ids with their counts
_Call = tuple[Sequence[str], Sequence[Argument]]


class Touches:
    """Counts what was returned and sends it in the background.

    Args:
        capacity: hot memories kept an owner.
        ttl_s: seconds after its last touch until a memory is cold.
    """

    def __init__(
        self, functions: Functions, *, capacity: int, ttl_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._functions = functions
        self._capacity = capacity
        self._ttl_ms = int(ttl_s * 1000)
        self._clock = clock
        self._pending: dict[tuple[Owner, tuple[str, ...]], int] = {}
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, owner: Owner, ids: Sequence[str], count: int = 1) -> None:
        """Count a result that was returned `count` times. Cost: O(ids) to hash them, under a microsecond."""
        key = owner, tuple(ids)
        pending = self._pending
        if key in pending:
            pending[key] += count
        elif ids and len(pending) < MAX_PENDING and not self._closing.is_set():
            pending[key] = count
            if self._task is None:
                # it outlives the request that happens to be the first
                self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def flush(self) -> None:
        """Send what was counted so far. Cost: a round trip per BATCH ids."""
        pending, self._pending = self._pending, {}
        owners: dict[Owner, Counter[str]] = {}
        for (owner, ids), count in pending.items():
            counts = owners.setdefault(owner, Counter())
            for memory_id in ids:
                counts[memory_id] += count
        calls = [call for owner, counts in owners.items() for call in self._calls(owner, counts)]
        for batch in _batches(calls):
            try:
                await self._functions.call_each("rm_touch_v1", batch)
            except Unavailable as exc:
                _log.debug("touches of %d users dropped: %s", len(owners), exc)
                return
            except RedisMemError as exc:
                _log.debug("some touches dropped: %s", exc)

    def _calls(self, owner: Owner, counts: Counter[str]) -> Iterator[_Call]:
        head = owner.memory_prefix, int(self._clock() * 1000), self._ttl_ms, self._capacity
        flat: list[Argument] = [item for pair in counts.items() for item in pair]
        for first in range(0, len(flat), 2 * BATCH):
            yield [owner.hot, owner.hits, owner.meta, owner.used], [*head, *flat[first : first + 2 * BATCH]]

    async def _run(self) -> None:
        try:
            while self._pending:
                with suppress(TimeoutError):
                    async with asyncio.timeout(FLUSH_EVERY_S):
                        await self._closing.wait()
                await self.flush()
        finally:
            self._task = None

    async def close(self) -> None:
        """Flush, within a second, and stop; whatever is added later is dropped."""
        self._closing.set()
        if self._task is None:
            return
        try:
            async with asyncio.timeout(FLUSH_EVERY_S):
                await self._task
        except TimeoutError:
            _log.debug("the last touches were not sent within %s s", FLUSH_EVERY_S)


def _batches(calls: Iterable[_Call]) -> Iterator[list[_Call]]:
    """Yield calls in their order, as many at once as have BATCH ids."""
    batch: list[_Call] = []
    room = 2 * BATCH
    for call in calls:
        size = len(call[1])
        if batch and size > room:
            yield batch
            batch, room = [], 2 * BATCH
        batch.append(call)
        room -= size
    if batch:
        yield batch
