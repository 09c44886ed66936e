"""The queue of jobs loses nothing, gives a job to one worker at a time, and shows what fails too often."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from redismem.errors import StoreError
from redismem.jobs import MOST_TRIES, Job, Jobs
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
from redismem.service import Service
from redismem.types import MemoryInput
from tests.conftest import until

NAME = "alice profile"


@dataclass
class Clock:
    now_s: float = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def jobs(service: Service, clock: Clock) -> Jobs:
    queue = Jobs(service.functions, clock=clock, claim_after_ms=1, rest=0)
    assert await queue.take("w") == []  # makes the group
    return queue


async def started(jobs: Jobs, worker: str = "w") -> Job:
    await jobs.start()
    (job,) = await jobs.take(worker, count=10)
    return job


async def due_s(service: Service, name: str = NAME) -> float | None:
    raw = await service.client.execute("ZSCORE", JOBS_LATER, name)
    return None if raw is None else float(raw) / 1000


async def reclaimed(jobs: Jobs, worker: str) -> list[Job]:
    """Take over what is silent, as soon as it has been silent for a millisecond."""
    await asyncio.sleep(0.005)
    return await jobs.reclaim(worker)


# waiting and starting ------------------------------------------------------------------------------


async def test_a_job_waits_once_from_the_earliest_moment(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    for after_s in (60.0, 5.0, 300.0):
        await jobs.queue(owner, "profile", after_s=after_s)
    assert await due_s(service) == clock.now_s + 5
    counts = await jobs.counts()
    assert (counts.waiting, counts.due, counts.started) == (1, 0, 0)


async def test_a_job_starts_when_it_is_due_and_not_before(jobs: Jobs, owner: Owner, clock: Clock) -> None:
    await jobs.queue(owner, "profile", after_s=10.0)
    assert await jobs.start() == 0
    assert await jobs.take("w") == []
    assert await jobs.start(ahead_s=9.9) == 0
    clock.now_s += 10
    assert await jobs.start() == 1
    (job,) = await jobs.take("w")
    assert (job.name, job.owner, job.kind) == (NAME, owner, "profile")
    assert await jobs.take("v") == []


async def test_a_namespace_a_store_and_odd_users_come_back_from_a_jobs_name(jobs: Jobs) -> None:
    owners, kind = [Owner("a b/c", "n}"), Owner("ü%20", "")], "summary:entity:New York|x y"
    for owner in owners:
        await jobs.queue(owner, kind)
    await jobs.schedule("nightly", 1)
    await jobs.start()
    taken = {(job.owner, job.kind) for job in await jobs.take("w", count=10)}
    assert taken == {(owners[0], kind), (owners[1], kind), (None, "nightly")}


async def test_of_a_name_one_job_waits_at_most_and_one_runs(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    await jobs.queue(owner, "profile")
    first = await started(jobs)
    await jobs.queue(owner, "profile")  # a write during the run
    for _ in range(3):
        assert await jobs.start() == 0
        clock.now_s += 2
    counts = await jobs.counts()
    assert (counts.waiting, counts.started) == (1, 1)
    await jobs.done(first, 0.0)
    assert await jobs.start() == 1
    assert (await jobs.take("w"))[0].entry != first.entry


async def test_ten_workers_that_start_and_take_at_once_get_each_job_once(jobs: Jobs) -> None:
    names = [f"profile{i}" for i in range(200)]
    await jobs.queue(Owner("alice"), *names)

    async def work(worker: str) -> list[Job]:
        taken: list[Job] = []
        while True:
            await jobs.start()
            if not (found := await jobs.take(worker, count=3)):
                return taken
            taken += found

    taken = [job.kind for part in await asyncio.gather(*(work(f"w{i}") for i in range(10))) for job in part]
    assert sorted(taken) == sorted(names)


async def test_a_write_queues_its_jobs_in_the_same_step_and_again_during_a_run(
    service: Service, owner: Owner
) -> None:
    jobs = Jobs(service.functions, rest=0)
    await jobs.take("w")
    await service.writer.put(owner, [MemoryInput(id="a", text="Ann sings", importance=0.9)])
    await jobs.start(ahead_s=5)
    taken = {job.kind: job for job in await jobs.take("w", count=10)}
    assert set(taken) == {"link", "profile"}
    await service.writer.put(owner, [MemoryInput(id="b", text="Ben sings", importance=0.9)])
    for job in taken.values():
        await jobs.done(job, 0.0)
    await jobs.start(ahead_s=5)
    assert {job.kind for job in await jobs.take("w", count=10)} == {"link", "profile"}


# rest and done -------------------------------------------------------------------------------------


async def test_a_job_rests_nine_times_as_long_as_it_took(
    service: Service, owner: Owner, clock: Clock
) -> None:
    jobs = Jobs(service.functions, clock=clock)
    await jobs.take("w")
    await jobs.queue(owner, "topics")
    await jobs.done(await started(jobs), 2.0)
    await jobs.queue(owner, "topics")
    await jobs.queue(owner, "profile")
    assert (await started(jobs)).kind == "profile"  # others do not wait for it
    assert await due_s(service, "alice topics") == clock.now_s + 18
    clock.now_s += 17.9
    assert await jobs.start() == 0
    clock.now_s += 0.2
    assert (await started(jobs)).kind == "topics"
    assert await service.client.execute("ZCARD", JOBS_REST) == 0


async def test_a_done_job_leaves_nothing(service: Service, jobs: Jobs, owner: Owner) -> None:
    await jobs.queue(owner, "profile")
    await jobs.done(await started(jobs), 0.0)
    keys = (JOBS_LATER, JOBS_LIVE, JOBS_REST, JOBS_TRIES, JOBS_DEAD)
    assert await service.client.execute("EXISTS", *keys) == 0
    assert await service.client.execute("XLEN", JOBS) == 0
    assert (await service.client.execute("XPENDING", JOBS, JOB_GROUP))[0] == 0


# failing -------------------------------------------------------------------------------------------


async def test_a_failed_job_waits_longer_each_time_and_is_dead_after_five(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    await jobs.queue(owner, "profile")
    waits = []
    for number in range(1, MOST_TRIES + 1):
        job = await started(jobs)
        assert await jobs.failed(job, f"error {number}") == (number == MOST_TRIES)
        if number < MOST_TRIES:
            due = await due_s(service)
            assert due is not None
            waits.append(due - clock.now_s)
            assert (await jobs.counts()).failing == 1
            clock.now_s = due
    for wait, base in zip(waits, (2, 8, 32, 128), strict=True):
        assert 0.75 * base <= wait <= 1.25 * base
    (letter,) = await jobs.dead()
    assert (letter.job, letter.tries, letter.error) == (NAME, MOST_TRIES, "error 5")
    assert letter.at_ms == int(clock.now_s * 1000)
    counts = await jobs.counts()
    assert (counts.waiting, counts.started, counts.failing, counts.dead) == (0, 0, 0, 1)


async def test_jobs_that_fail_together_are_not_tried_again_together(
    service: Service, jobs: Jobs, owner: Owner
) -> None:
    names = [f"profile{i}" for i in range(8)]
    await jobs.queue(owner, *names)
    await jobs.start()
    for job in await jobs.take("w", count=10):
        await jobs.failed(job, "x")
    assert len({await due_s(service, owner.job(name)) for name in names}) > 4


async def test_a_failed_job_that_is_queued_anew_does_not_wait_for_its_back_off(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    await jobs.queue(owner, "profile")
    job = await started(jobs)
    await jobs.queue(owner, "profile", after_s=0.5)
    await jobs.failed(job, "x")
    assert await due_s(service) == clock.now_s + 0.5


async def test_a_success_forgets_failures_and_a_dead_letter(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    await jobs.queue(owner, "profile")
    await jobs.failed(await started(jobs), "x")
    clock.now_s += 10
    await jobs.done(await started(jobs), 0.0)
    await jobs.queue(owner, "profile")
    await jobs.failed(await started(jobs), "x")
    assert await service.client.execute("HGET", JOBS_TRIES, NAME) == b"1 x"
    await service.client.execute("HSET", JOBS_DEAD, NAME, '{"tries": 5, "error": "x", "at_ms": 1}')
    clock.now_s += 10
    await jobs.done(await started(jobs), 0.0)
    assert await jobs.dead() == []


async def test_dead_letters_come_latest_first_and_wait_again_when_asked(
    jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    for kind in ("profile", "topics", "link"):
        clock.now_s += 60
        await jobs.queue(owner, kind)
        await jobs._fail(await started(jobs), "x" * 9999, most=1)
    letters = await jobs.dead()
    assert [letter.job for letter in letters] == ["alice link", "alice topics", "alice profile"]
    assert {len(letter.error) for letter in letters} == {500}
    assert await jobs.retry(["alice topics", "alice nothing"]) == 1
    assert (await started(jobs)).kind == "topics"
    assert await jobs.retry() == 2
    assert await jobs.retry() == 0
    await jobs.start()
    assert {job.kind for job in await jobs.take("w", count=9)} == {"link", "profile"}
    assert await jobs.dead() == []


# dying workers -------------------------------------------------------------------------------------


async def test_the_job_of_a_silent_worker_is_taken_over_and_done_once(
    service: Service, jobs: Jobs, owner: Owner
) -> None:
    await jobs.queue(owner, "profile")
    job = await started(jobs, "dead")
    patient = Jobs(service.functions, claim_after_ms=60_000)
    assert await patient.reclaim("w") == []
    assert await reclaimed(jobs, "w") == [job]
    await jobs.done(job, 0.0)
    await jobs.done(job, 0.0)  # its first worker was only slow
    assert await reclaimed(jobs, "w") == []
    assert (await jobs.counts()).started == 0


async def test_a_slow_worker_that_was_overtaken_ends_no_other_run(jobs: Jobs, owner: Owner) -> None:
    await jobs.queue(owner, "profile")
    slow = await started(jobs, "slow")
    (job,) = await reclaimed(jobs, "w")
    await jobs.done(job, 0.0)
    await jobs.queue(owner, "profile")
    running = await started(jobs, "w")
    await jobs.queue(owner, "profile")
    await jobs.done(slow, 0.0)
    assert await jobs.start() == 0
    await jobs.done(running, 0.0)
    assert (await jobs.counts()).waiting == 1


async def test_a_job_that_is_held_is_not_taken_over(service: Service, owner: Owner) -> None:
    jobs = Jobs(service.functions, claim_after_ms=300, rest=0)
    await jobs.take("w")
    await jobs.queue(owner, "profile", "topics")
    await jobs.start()
    held, left = await jobs.take("w", count=2)

    async def is_taken_over() -> bool:
        await jobs.hold("w", [held])
        return await jobs.reclaim("v", count=2) == [left]

    await until("the job that is not held is taken over", is_taken_over)
    await jobs.hold("w", [held])
    rows = await service.client.execute("XPENDING", JOBS, JOB_GROUP, "-", "+", 9)
    assert {(row[0].decode(), row[1], row[3]) for row in rows} == {
        (held.entry, b"w", 1),
        (left.entry, b"v", 2),
    }


async def test_holding_what_is_done_brings_nothing_back(jobs: Jobs, owner: Owner) -> None:
    await jobs.queue(owner, "profile")
    job = await started(jobs)
    await jobs.done(job, 0.0)
    await jobs.hold("w", [job])
    assert await reclaimed(jobs, "v") == []


async def test_a_job_whose_workers_die_five_times_is_dead(jobs: Jobs, owner: Owner) -> None:
    await jobs.queue(owner, "profile")
    job = await started(jobs, "w0")
    for number in range(1, MOST_TRIES):
        assert await reclaimed(jobs, f"w{number}") == [job]
    assert await reclaimed(jobs, "w9") == []
    (letter,) = await jobs.dead()
    assert letter.error == "its worker died 5 times"
    counts = await jobs.counts()
    assert (counts.waiting, counts.started, counts.dead) == (0, 0, 1)
    await jobs.retry()
    assert (await started(jobs)).name == NAME


async def test_a_job_that_kills_its_workers_does_not_hold_up_the_others(jobs: Jobs, owner: Owner) -> None:
    await jobs.queue(owner, "profile")
    bad = await started(jobs, "w0")
    for number in range(1, MOST_TRIES):
        await reclaimed(jobs, f"w{number}")
    await jobs.queue(owner, "topics")
    good = await started(jobs, "w0")
    assert await reclaimed(jobs, "w") == []
    assert await reclaimed(jobs, "w") == [good]
    assert bad.entry not in {job.entry for job in await reclaimed(jobs, "w")}


# other hands ---------------------------------------------------------------------------------------


async def test_a_group_that_another_hand_removed_is_made_again_and_its_jobs_are_given(
    service: Service, jobs: Jobs, owner: Owner
) -> None:
    await jobs.queue(owner, "profile", "topics")
    await jobs.start()
    (job,) = await jobs.take("w")
    await service.client.execute("XGROUP", "DESTROY", JOBS, JOB_GROUP)
    assert await jobs.reclaim("w") == []
    assert await jobs.take("w") == []
    taken = await jobs.take("w", count=9)
    assert {one.kind for one in taken} == {"profile", "topics"}
    assert job in taken


async def test_a_stream_that_another_hand_removed_does_not_hold_up_what_is_queued_anew(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    await jobs.queue(owner, "profile")
    await started(jobs)
    await service.client.execute("DEL", JOBS)
    assert await jobs.take("w") == []
    await jobs.queue(owner, "profile")
    assert (await started(jobs)).name == NAME


async def test_a_stream_that_another_hand_removed_loses_no_job(
    service: Service, jobs: Jobs, owner: Owner, clock: Clock
) -> None:
    await jobs.queue(owner, "profile")
    await jobs.start()
    await service.client.execute("DEL", JOBS)
    assert await jobs.take("w") == []
    clock.now_s += 1
    assert (await started(jobs)).name == NAME


@pytest.mark.parametrize("key", [JOBS, JOBS_LATER, JOBS_LIVE])
async def test_a_key_of_a_foreign_type_is_refused_and_loses_no_job(
    service: Service, jobs: Jobs, owner: Owner, key: str
) -> None:
    await jobs.queue(owner, "profile")
    job = await started(jobs)
    await jobs.queue(owner, "topics")
    await service.client.execute("RENAME", key, "redismem:aside")
    await service.client.execute("SET", key, "x")
    for call in (jobs.start(), jobs.done(job, 1.0), jobs.failed(job, "x")):
        with pytest.raises(StoreError, match="RMEM_TYPE"):
            await call
    await service.client.execute("RENAME", "redismem:aside", key)
    counts = await jobs.counts()
    assert (counts.waiting, counts.started, counts.failing, counts.dead) == (1, 1, 0, 0)


# schedule and cancel -------------------------------------------------------------------------------


async def test_a_round_is_queued_once_a_slot_whoever_asks(service: Service, jobs: Jobs) -> None:
    asked = await asyncio.gather(*(jobs.schedule("nightly", 7) for _ in range(10)))
    assert sorted(asked) == [False] * 9 + [True]
    assert (await started(jobs)).name == " nightly"
    assert not await jobs.schedule("nightly", 6)
    assert await jobs.schedule("nightly", 8)
    assert await jobs.schedule("hourly", 3)
    assert await service.client.execute("HGET", STORE, "schedule:nightly") == b"8"


async def test_forgetting_a_user_cancels_what_waits_fails_and_is_dead_and_no_ones_else(
    service: Service, jobs: Jobs
) -> None:
    users = [Owner("ann"), Owner("ann", "n"), Owner("anna"), Owner("an")]
    for user in users:
        await jobs.queue(user, "profile", "topics", "link")
        await jobs.start()
        for job in await jobs.take("w", count=9):
            if job.kind == "topics":
                await jobs._fail(job, "x", most=1)
            elif job.kind == "link":
                await jobs.failed(job, "x")
            else:
                await jobs.done(job, 0.0)
        await jobs.queue(user, "summary:entity:Ben")
    await jobs.cancel(users[0])
    kept = {user.tag for user in users[1:]}
    for command, key in (("ZRANGE", JOBS_LATER), ("HKEYS", JOBS_TRIES), ("HKEYS", JOBS_DEAD)):
        rest = (0, -1) if command == "ZRANGE" else ()
        names = await service.client.execute(command, key, *rest)
        assert {name.decode().partition(" ")[0] for name in names} == kept, key


async def test_counts_tell_for_how_long_the_oldest_is_late(jobs: Jobs, owner: Owner, clock: Clock) -> None:
    assert (await jobs.counts()).late_s == 0
    await jobs.queue(owner, "profile", after_s=5.0)
    assert (await jobs.counts()).late_s == 0
    clock.now_s += 12.5
    counts = await jobs.counts()
    assert (counts.due, counts.late_s) == (1, 7.5)
