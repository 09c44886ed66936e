"""The only place that speaks to the queue of jobs: what waits, what is being done, what failed too often.

The Functions that write memories queue jobs in the same step (lua/parts/derived.lua). A job that is due moves
to a stream, where a consumer group gives it to one worker; it leaves the stream when it is done. What a dead
worker held is taken over after CLAIM_AFTER_MS. So a job is done at least once, and whoever does it must bear
repetition. There is one job of a name at most that waits and one that is being done.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import msgspec

from redismem.client import Argument
from redismem.errors import StoreError
from redismem.keys import (
    JOB_GROUP,
    JOBS,
    JOBS_DEAD,
    JOBS_LATER,
    JOBS_LIVE,
    JOBS_REST,
    JOBS_TRIES,
    STORE,
    Owner,
)
from redismem.lualib import Functions

#: a job whose worker gave no sign for so long is another's; workers give one three times as often
CLAIM_AFTER_MS = 30_000

#: a job that fails this often, or whose worker dies this often, becomes a dead letter
MOST_TRIES = 5

#: seconds until a failed job is tried again: the first wait, and the factor from one to the next
_BACK_OFF_S, _GROWTH = 2.0, 4.0

#: a job that took t may start again after this many times t: nobody keeps a core busy for themselves
REST = 9

#: jobs started by one call
_START = 100

_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class Job:
    """A job in a worker's hands."""

    entry: str
    name: str

    @property
    def owner(self) -> Owner | None:
        """Whose it is; None for jobs of the whole store."""
        tag = self.name.partition(" ")[0]
        return Owner.from_tag(tag) if tag else None

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[2]


class DeadLetter(msgspec.Struct, kw_only=True):
    """A job that failed too often."""

    job: str = ""
    tries: int
    error: str
    at_ms: int


class JobCounts(msgspec.Struct, kw_only=True):
    """How many jobs there are; `late_s`: for how long the oldest that is due has waited."""

    waiting: int
    due: int
    started: int
    failing: int
    dead: int
    late_s: float


class Jobs:
    """The queue, as one worker or caller sees it."""

    def __init__(
        self,
        functions: Functions,
        *,
        clock: Callable[[], float] = time.time,
        claim_after_ms: int = CLAIM_AFTER_MS,
        rest: float = REST,
    ) -> None:
        self._functions = functions
        self._client = functions.client
        self._clock = clock
        self._random = random.Random()  # noqa: S311  # spreads retries
        self._rest = rest
        self.claim_after_ms = claim_after_ms

    async def queue(self, owner: Owner, *kinds: str, after_s: float = 0.0) -> None:
        """Queue jobs; one that waits already starts at the earlier moment. Cost: one round trip."""
        names = [owner.job(kind) for kind in kinds]
        await self._functions.call("rm_jobs_queue_v1", [JOBS_LATER], self._ms(after_s), *names)

    async def start(self, *, ahead_s: float = 0.0) -> int:
        """Move jobs that are due to the stream; return how many.

        Args:
            ahead_s: also those due within so many seconds.
        """
        keys = [JOBS, JOBS_LATER, JOBS_LIVE, JOBS_REST]
        return int(await self._functions.call("rm_jobs_start_v1", keys, self._ms(ahead_s), _START))

    async def take(self, worker: str, *, count: int = 1) -> list[Job]:
        """Return jobs that are now this worker's. It never blocks: the connection is everybody's."""
        try:
            reply = await self._client.execute(
                "XREADGROUP", "GROUP", JOB_GROUP, worker, "COUNT", count, "STREAMS", JOBS, ">"
            )
        except StoreError as exc:
            if "NOGROUP" not in exc.message:
                raise
            await self._client.execute(
                "EVAL",
                "redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM') return 1",
                *(1, JOBS, JOB_GROUP),
            )
            return []
        return [_job(raw_id, flat) for _, entries in reply or () for raw_id, flat in entries]

    async def hold(self, worker: str, jobs: Sequence[Job]) -> None:
        """Tell that the worker is still at these jobs. Cost: one round trip."""
        if jobs:
            entries = [job.entry for job in jobs]
            await self._client.execute("XCLAIM", JOBS, JOB_GROUP, worker, 0, *entries, "JUSTID")

    async def reclaim(self, worker: str, *, count: int = 1) -> list[Job]:
        """Take over jobs of workers that gave no sign; one whose workers keep dying becomes a dead letter."""
        try:
            rows = await self._client.execute(
                "XPENDING", JOBS, JOB_GROUP, "IDLE", self.claim_after_ms, "-", "+", count
            )
        except StoreError as exc:
            if "NOGROUP" in exc.message:
                return []
            raise
        found = []
        for raw_id, _, _, deliveries in rows:
            entry = raw_id.decode()
            claimed = await self._client.execute(
                "XCLAIM", JOBS, JOB_GROUP, worker, self.claim_after_ms, entry
            )
            for claimed_id, flat in claimed:
                job = _job(claimed_id, flat)
                if deliveries >= MOST_TRIES:
                    await self._fail(job, f"its worker died {deliveries} times", most=1)
                else:
                    found.append(job)
        return found

    async def done(self, job: Job, took_s: float) -> None:
        """Take a job out; it rests in proportion to the time it took."""
        keys = [JOBS, JOBS_LATER, JOBS_LIVE, JOBS_REST, JOBS_TRIES, JOBS_DEAD]
        rest_ms = int(self._rest * took_s * 1000)
        await self._functions.call(
            "rm_job_done_v1", keys, JOB_GROUP, job.entry, job.name, self._ms(), rest_ms
        )

    async def failed(self, job: Job, error: str) -> bool:
        """Put a job back for later, or among the dead letters; return whether it is dead."""
        return await self._fail(job, error, most=MOST_TRIES)

    async def _fail(self, job: Job, error: str, *, most: int) -> bool:
        raw = await self._client.execute("HGET", JOBS_TRIES, job.name)
        tries = int(raw.split(b" ", 1)[0]) if raw else 0
        back_off_s = _BACK_OFF_S * _GROWTH**tries * self._random.uniform(0.75, 1.25)
        keys = [JOBS, JOBS_LATER, JOBS_LIVE, JOBS_TRIES, JOBS_DEAD]
        word, _ = await self._functions.call(
            "rm_job_failed_v1",
            keys,
            *(JOB_GROUP, job.entry, job.name, self._ms(), self._ms(back_off_s), most, error[:_ERROR_CHARS]),
        )
        return bool(word == b"DEAD")

    async def schedule(self, name: str, slot: int) -> bool:
        """Queue a job of the store once a slot, whoever asks; return whether it was this call."""
        reply = await self._functions.call(
            "rm_schedule_v1", [STORE, JOBS_LATER], name, slot, self._ms(), f" {name}"
        )
        return bool(reply == b"OK")

    async def cancel(self, owner: Owner) -> None:
        """Remove what waits for an owner who was forgotten. Cost: a round trip per 1,000 jobs there are."""
        async for job in self._matching(owner.job("*")):
            await self._client.execute("ZREM", JOBS_LATER, job)
            await self._client.execute("HDEL", JOBS_DEAD, job)
            await self._client.execute("HDEL", JOBS_TRIES, job)

    async def _matching(self, pattern: str) -> AsyncIterator[bytes]:
        for command, key in (("ZSCAN", JOBS_LATER), ("HSCAN", JOBS_DEAD), ("HSCAN", JOBS_TRIES)):
            cursor: Argument = 0
            while True:
                cursor, flat = await self._client.execute(
                    command, key, cursor, "MATCH", pattern, "COUNT", 1000
                )
                for job in flat[::2]:
                    yield job
                if cursor in (b"0", 0):
                    break

    async def counts(self) -> JobCounts:
        """Return how many jobs there are. Cost: one round trip."""
        now_ms = self._ms()
        waiting, due, oldest, started, failing, dead = await self._client.pipeline(
            [
                ("ZCARD", JOBS_LATER),
                ("ZCOUNT", JOBS_LATER, "-inf", now_ms),
                ("ZRANGE", JOBS_LATER, 0, 0, "WITHSCORES"),
                ("XLEN", JOBS),
                ("HLEN", JOBS_TRIES),
                ("HLEN", JOBS_DEAD),
            ]
        )
        late_s = max(0.0, (now_ms - float(oldest[1])) / 1000) if oldest else 0.0
        return JobCounts(
            waiting=waiting, due=due, started=started, failing=failing, dead=dead, late_s=round(late_s, 3)
        )

    async def dead(self) -> list[DeadLetter]:
        """Return the dead letters, the latest first."""
        flat = await self._client.execute("HGETALL", JOBS_DEAD)
        letters = []
        for raw_job, raw in zip(flat[::2], flat[1::2], strict=True):
            letter = msgspec.json.decode(raw, type=DeadLetter)
            letter.job = raw_job.decode("utf-8", "replace")
            letters.append(letter)
        return sorted(letters, key=lambda letter: -letter.at_ms)

    async def retry(self, names: Sequence[str] = ()) -> int:
        """Let dead letters wait again, all unless named; return how many."""
        wanted = names or [letter.job for letter in await self.dead()]
        if not wanted:
            return 0
        keys = [JOBS_DEAD, JOBS_LATER, JOBS_TRIES]
        return int(await self._functions.call("rm_jobs_retry_v1", keys, self._ms(), *wanted))

    def _ms(self, after_s: float = 0.0) -> int:
        return int((self._clock() + after_s) * 1000)


def _job(raw_id: bytes, flat: Sequence[bytes]) -> Job:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return Job(raw_id.decode(), fields.get(b"job", b"").decode("utf-8", "replace"))
