"""The worker: takes jobs, does them, and says how it went. Any number of workers share a store's jobs.

Handlers write nothing by themselves: what they derive is stored by Functions that compare its sources with
what was read. So a job may be done twice, by two workers at once, or half and then again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime

from redismem.errors import RedisMemError, RedisUnavailable
from redismem.jobs import Job
from redismem.keys import Owner
from redismem.worker.foreign import ForeignWrites
from redismem.worker.links import link
from redismem.worker.profiles import profile
from redismem.worker.rounds import DAY_S, HOUR_S, decay, embed, hourly, nightly
from redismem.worker.summaries import periods, summary
from redismem.worker.tools import Overtaken, Tools
from redismem.worker.topics import topics

logger = logging.getLogger(__name__)

#: jobs done side by side: one waits for Redis or an embedding while another computes
_LANES = 2

#: seconds between two looks for jobs when there are none
_POLL_S = 0.5

#: seconds between two looks for jobs of dead workers
_RECLAIM_S = 5.0

#: seconds between two looks at the clock
_CLOCK_S = 30.0

#: hour of the night, UTC, from which the nightly round may begin
_NIGHT = 3

_OF_OWNER: dict[str, Callable[[Tools, Owner], Awaitable[None]]] = {
    "link": link,
    "topics": topics,
    "profile": profile,
    "periods": periods,
    "embed": embed,
    "decay": decay,
}

_OF_STORE: dict[str, Callable[[Tools], Awaitable[None]]] = {"hourly": hourly, "nightly": nightly}

#: kinds that change fields of many memories, so that their index wears
_WEARING = ("link", "topics", "decay", "embed")

#: kinds that do without the owner's index
_UNINDEXED = ("decay",)


class Worker:
    """Does the jobs of one store. `counts`: how many were done, retried, are dead, by kind."""

    def __init__(self, tools: Tools, foreign: ForeignWrites) -> None:
        self.id = f"worker-{secrets.token_hex(6)}"
        self._tools = tools
        self._jobs = tools.jobs
        self._foreign = foreign
        self._holding: dict[str, Job] = {}
        self._reclaim_at_s = 0.0
        self.counts: Counter[str] = Counter()
        #: told kind and seconds of each job that was done
        self.on_done: Callable[[str, float], None] = lambda _kind, _took_s: None

    async def run(self) -> None:
        """Do what is due until cancelled; what is on its way then is done by another, or later."""
        self._foreign.listen()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_LANES):
                tasks.create_task(self._lane())
            tasks.create_task(self._every(self._jobs.claim_after_ms / 3000, self._hold))
            tasks.create_task(self._every(_CLOCK_S, self.look_at_clock))
            tasks.create_task(self._every(1.0, self._foreign.look))

    async def _every(self, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await work()
            except RedisMemError as exc:
                logger.debug("again in %s s: %s", seconds, exc)
            except Exception:  # a defect in one of these must not end the jobs
                logger.exception("a worker's chore failed")
            await asyncio.sleep(seconds)

    async def _lane(self) -> None:
        while True:
            is_done = False
            with suppress(RedisUnavailable):
                try:
                    is_done = await self.step()
                except RedisUnavailable:
                    raise
                except Exception:  # a defect must not end the lane
                    logger.exception("a worker cannot take jobs")
            if not is_done:
                await asyncio.sleep(_POLL_S * random.uniform(0.5, 1.0))  # noqa: S311  # not all at once

    async def step(self, *, ahead_s: float = 0.0) -> bool:
        """Do one job; return whether there was one.

        Args:
            ahead_s: also one that is due within so many seconds.
        """
        jobs = await self._jobs.take(self.id)
        if not jobs and await self._jobs.start(ahead_s=ahead_s):
            jobs = await self._jobs.take(self.id)
        if not jobs and time.monotonic() >= self._reclaim_at_s:
            self._reclaim_at_s = time.monotonic() + min(_RECLAIM_S, self._jobs.claim_after_ms / 1000)
            jobs = await self._jobs.reclaim(self.id)
        for job in jobs:
            await self._do(job)
        return bool(jobs)

    async def settle(self, *, ahead_s: float = 0.0) -> int:
        """Do all that is due, and what that makes due; return how many jobs there were."""
        count = 0
        while await self.step(ahead_s=ahead_s):
            count += 1
        return count

    async def make(self, owner: Owner, kind: str) -> None:
        """Make something now, whether or not a job of this kind waits: for people at a shell."""
        await self._perform(Job("", owner.job(kind)))

    async def _do(self, job: Job) -> None:
        kind = job.kind.partition(":")[0]
        self._holding[job.entry] = job
        started = time.perf_counter()
        try:
            await self._perform(job)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the job must not be lost
            if await self._is_forgotten(job):
                await self._jobs.done(job, 0.0)
                return
            is_dead = await self._jobs.failed(job, _shown(exc))
            self.counts[f"{kind} {'dead' if is_dead else 'retried'}"] += 1
            if is_dead:  # where it happened, without what a foreign error may quote
                where = "".join(traceback.format_tb(exc.__traceback__))
                logger.warning("job %s failed too often: %s\n%s", kind, _shown(exc), where)
            else:
                logger.info("job %s is tried again: %s", kind, _shown(exc))
        else:
            took_s = time.perf_counter() - started
            await self._jobs.done(job, took_s)
            self.counts[f"{kind} done"] += 1
            self.on_done(kind, took_s)
        finally:
            self._holding.pop(job.entry, None)

    async def _perform(self, job: Job) -> None:
        kind, _, rest = job.kind.partition(":")
        owner = job.owner
        if owner is None:
            await _OF_STORE[kind](self._tools)
            return
        index, state = await self._tools.client.execute("HMGET", owner.meta, "index", "index_state")
        if index is None:
            return  # forgotten
        if state is not None and kind not in _UNINDEXED:
            await self._tools.indexes.complete(owner, None)
        if kind == "summary":
            what, _, name = rest.partition(":")
            await summary(self._tools, owner, what, name)
        else:
            await _OF_OWNER[kind](self._tools, owner)
        if kind in _WEARING:
            await self._tools.indexes.refresh(owner)

    async def _is_forgotten(self, job: Job) -> bool:
        """Return whether the owner of a job is gone, which is why it failed."""
        owner = job.owner
        return owner is not None and not await self._tools.client.execute("HEXISTS", owner.meta, "index")

    async def _hold(self) -> None:
        await self._jobs.hold(self.id, list(self._holding.values()))

    async def look_at_clock(self) -> None:
        """Queue the rounds whose hour has come, once in all workers of the store."""
        now_s = self._tools.clock()
        await self._jobs.schedule("hourly", int(now_s // HOUR_S))
        if datetime.fromtimestamp(now_s, UTC).hour >= _NIGHT:
            await self._jobs.schedule("nightly", int(now_s // DAY_S))

    async def close(self) -> None:
        """Give back what only this worker uses."""
        await self._tools.pool.close()
        if self._tools.language_model is not None:
            await self._tools.language_model.close()


def _shown(exc: Exception) -> str:
    """Return an error without memory text: only ours say nothing of it."""
    return (
        f"{type(exc).__name__}: {exc}" if isinstance(exc, RedisMemError | Overtaken) else type(exc).__name__
    )
