from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as foreign

from redismem import lane as lane_module
from redismem.client import Argument, Client, packed
from redismem.embedded import EmbeddedRedis
from redismem.errors import RedisUnavailable
from redismem.lane import Lane
from redismem.settings import Settings
from tests.conftest import until

#: longer than any pause of a busy test machine
PATIENT_S = 20.0
#: what tests of a silent Redis wait for
SHORT_S = 0.2
AWAY = (foreign.ConnectionError, foreign.TimeoutError)


async def call(lane: Lane, *command: Argument) -> Any:
    return (await lane.call(packed((command,))))[0]


async def ok(value: bool) -> bool:
    return value


async def answers(lane: Lane) -> bool:
    with suppress(foreign.RedisError):
        return await call(lane, "PING") == b"PONG"
    return False


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("redismem-lane")}


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server of the test's own, which it may stop."""
    async with EmbeddedRedis(tmp_path, persist=False) as opened:
        yield opened
        if opened.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(opened.pid, signal.SIGCONT)


@pytest.fixture
async def other(redis: EmbeddedRedis) -> AsyncIterator[Client]:
    """A connection of the test's own to that server."""
    client = Client(Settings(), redis.url)
    await client.execute("PING")
    yield client
    await client.close()


@pytest.fixture
async def lane(redis: EmbeddedRedis) -> AsyncIterator[Lane]:
    """A connected lane that gives no call up."""
    opened = Lane(redis.url, timeout_s=PATIENT_S, max_in_flight=1000)
    await call(opened, "PING")
    yield opened
    await opened.close()


@pytest.fixture
async def hasty(redis: EmbeddedRedis) -> AsyncIterator[Lane]:
    """A connected lane that soon calls Redis dead."""
    opened = Lane(redis.url, timeout_s=SHORT_S, max_in_flight=1000)
    await call(opened, "PING")
    yield opened
    await opened.close()


def pid_of(redis: EmbeddedRedis) -> int:
    assert redis.pid is not None
    return redis.pid


async def lane_id(other: Client) -> int:
    """Return the id of the lane's connection: neither of the test's own."""
    rows = (await other.execute("CLIENT", "LIST")).decode().splitlines()
    own = await other.execute("CLIENT", "ID")
    (found,) = [row for row in rows if " name=redismem " in row and not row.startswith(f"id={own} ")]
    return int(found.split()[0].removeprefix("id="))


async def test_two_hundred_callers_each_get_their_own_replies(lane: Lane) -> None:
    rng = random.Random(1)

    async def caller(number: int) -> None:
        for step in range(20):
            name = f"{number}-{step}"
            match rng.randrange(4):
                case 0:
                    assert await call(lane, "ECHO", name) == name.encode()
                case 1:
                    size = rng.randrange(100_000)
                    assert await call(lane, "ECHO", name * size) == name.encode() * size
                case 2:
                    replies = await lane.call(packed([("ECHO", name), ("ECHO", step), ("ECHO", number)]), 3)
                    assert replies == [name.encode(), b"%d" % step, b"%d" % number]
                case _:
                    with pytest.raises(foreign.ResponseError, match=f"X{name}X"):
                        await call(lane, f"X{name}X")

    await asyncio.gather(*(caller(number) for number in range(200)))


async def test_an_error_reply_is_raised_after_all_replies_were_read(lane: Lane) -> None:
    await call(lane, "SET", "text", "a")
    commands = [("SET", "before", 1), ("INCR", "text"), ("LPUSH", "text", 1), ("SET", "after", 1)]
    neighbour = asyncio.create_task(call(lane, "ECHO", "mine"))
    with pytest.raises(foreign.ResponseError, match="not an integer"):
        await lane.call(packed(commands), len(commands))
    assert await neighbour == b"mine"
    assert await call(lane, "MGET", "before", "after") == [b"1", b"1"]


@pytest.mark.parametrize(
    ("argument", "stored"),
    [
        (bytes(range(256)), bytes(range(256))),
        (b"\r\n$3\r\nfoo\r\n", b"\r\n$3\r\nfoo\r\n"),
        ("", b""),
        (b"", b""),
        ("é 😀 \0", "é 😀 \0".encode()),
        (-7, b"-7"),
        (10**20, b"100000000000000000000"),
        (0.1, b"0.1"),
        (1e300, b"1e+300"),
        ("x" * 5_000_000, b"x" * 5_000_000),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_arguments_arrive_as_they_are(lane: Lane, argument: Argument, stored: bytes) -> None:
    assert await call(lane, "ECHO", argument) == stored


@pytest.mark.parametrize("wrong", [None, True, [1]], ids=repr)
async def test_what_is_no_argument_disturbs_nobody(lane: Lane, wrong: Any) -> None:
    neighbour = asyncio.create_task(call(lane, "ECHO", "mine"))
    with pytest.raises(TypeError):
        await call(lane, "ECHO", wrong)
    assert await neighbour == b"mine"


async def test_calls_of_one_turn_that_find_others_waiting_go_out_in_one_write(lane: Lane) -> None:
    writes: list[bytes] = []
    writer = lane._writer
    assert writer is not None
    write = writer.write
    writer.write = lambda data: (writes.append(data), write(data))[1]  # type: ignore[method-assign]
    await asyncio.gather(*(call(lane, "ECHO", i) for i in range(50)))
    assert [data.count(b"ECHO") for data in writes] == [1, 49]


async def test_a_cancelled_caller_disturbs_nobody(lane: Lane) -> None:
    async def caller(number: int) -> bytes:
        await asyncio.sleep(0)
        reply: bytes = await call(lane, "ECHO", number)
        return reply

    for turns in range(4):  # before it is queued, queued, sent, answered
        callers = [asyncio.create_task(caller(number)) for number in range(300)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for cancelled in callers[::3]:
            cancelled.cancel()
        replies = await asyncio.gather(*callers, return_exceptions=True)
        for number, reply in enumerate(replies):
            if number % 3:
                assert reply == b"%d" % number
    await until("every reply was read", lambda: ok(not lane._waiting))
    assert lane._waiting_bytes == 0


async def test_a_killed_connection_under_load_fails_no_call(lane: Lane, other: Client) -> None:
    done, ended = [0], False

    async def caller(number: int) -> None:
        while not ended:
            assert await call(lane, "ECHO", f"{number}-{done[0]}".encode()) is not None
            replies = await lane.call(packed([("ECHO", "a"), ("ECHO", number)]), 2)
            assert replies == [b"a", b"%d" % number]
            done[0] += 1

    callers = [asyncio.create_task(caller(number)) for number in range(50)]
    for _ in range(10):
        before = done[0]
        assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
        await until("calls go on", lambda at=before: ok(done[0] > at + 200))
    ended = True
    await asyncio.gather(*callers)
    assert lane.is_up


async def half_answered(lane: Lane, other: Client) -> None:
    """Wait until the oldest call has its first reply and Redis blocks on its second command."""

    async def check() -> bool:
        info = (await other.execute("INFO", "clients")).decode()
        return "blocked_clients:1" in info and lane._waiting[0].replies == [b"first"]

    await until("one reply has come", check)


async def test_a_call_that_was_answered_in_part_is_repeated_whole(lane: Lane, other: Client) -> None:
    waiting = asyncio.create_task(lane.call(packed([("ECHO", "first"), ("BLPOP", "list", 0)]), 2))
    neighbour = asyncio.create_task(call(lane, "ECHO", "mine"))
    await asyncio.sleep(0)
    await half_answered(lane, other)
    assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
    await until("it is repeated", lambda: ok(lane._waiting[0].repeated))
    await half_answered(lane, other)
    await other.execute("LPUSH", "list", "second")
    assert await waiting == [b"first", [b"list", b"second"]]
    assert await neighbour == b"mine"


async def test_a_call_is_not_repeated_twice(lane: Lane, other: Client) -> None:
    waiting = asyncio.create_task(lane.call(packed([("ECHO", "first"), ("BLPOP", "list", 0)]), 2))
    neighbour = asyncio.create_task(call(lane, "ECHO", "mine"))
    await asyncio.sleep(0)
    await half_answered(lane, other)
    assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
    await until("it is repeated", lambda: ok(lane._waiting[0].repeated))
    await half_answered(lane, other)
    assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
    for each in (waiting, neighbour):
        with pytest.raises(foreign.ConnectionError):
            await each
    assert lane.is_up
    assert await answers(lane)


async def test_a_connection_that_never_answers_is_not_replaced_without_a_pause(
    lane: Lane, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "RECONNECT_S", PATIENT_S)
    first = lane._writer
    assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
    await until("it is replaced", lambda: ok(lane._writer not in (first, None)))
    waiting = asyncio.create_task(call(lane, "BLPOP", "list", 0))
    await asyncio.sleep(0)
    assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
    with pytest.raises(foreign.ConnectionError):
        await waiting
    await until("it is back", lambda: answers(lane))


async def test_a_cancelled_call_is_not_repeated(lane: Lane, other: Client) -> None:
    assert await call(lane, "DEL", "counted") == 0
    writes = asyncio.create_task(lane.call(packed([("BLPOP", "nothing", 0), ("INCR", "counted")]), 2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    writes.cancel()
    assert await other.execute("CLIENT", "KILL", "ID", await lane_id(other)) == 1
    await until("it is back", lambda: answers(lane))
    assert await call(lane, "GET", "counted") is None


async def test_a_silent_redis_fails_what_waits_then_refuses_and_resumes(
    hasty: Lane, redis: EmbeddedRedis
) -> None:
    os.kill(pid_of(redis), signal.SIGSTOP)
    waiting = await asyncio.gather(*(call(hasty, "PING") for _ in range(50)), return_exceptions=True)
    assert {type(error) for error in waiting} == {foreign.TimeoutError}
    await until("it is down", lambda: ok(not hasty.is_up))
    for _ in range(500):
        refused = asyncio.create_task(call(hasty, "PING"))
        await asyncio.sleep(0)
        assert refused.done(), "a call waits for a Redis that is away"
        assert isinstance(refused.exception(), AWAY)
    assert not hasty._waiting
    os.kill(pid_of(redis), signal.SIGCONT)
    await until("it resumes without traffic", lambda: ok(hasty.is_up))
    assert await call(hasty, "PING") == b"PONG"


async def test_a_late_call_fails_alone_on_a_connection_that_answers(redis: EmbeddedRedis) -> None:
    hasty = Lane(redis.url, timeout_s=3 * SHORT_S, max_in_flight=10)
    # one command a read of Redis, which writes its reply before it reads the next
    slow = packed([("EVAL", "for _ = 1, 200000 do end return 1", 0, "x" * 17_000)] * 500)
    late = [asyncio.create_task(hasty.call(slow, 500)) for _ in range(3)]
    outcomes = await asyncio.gather(*late, return_exceptions=True)
    assert any(isinstance(outcome, foreign.TimeoutError) for outcome in outcomes)
    assert hasty.is_up, "replies kept coming"
    await until("replies of late calls are dropped", lambda: ok(not hasty._waiting), 60)
    assert await call(hasty, "ECHO", "mine") == b"mine"
    await hasty.close()


async def test_a_pause_of_this_process_is_no_silence_of_redis(hasty: Lane, redis: EmbeddedRedis) -> None:
    waiting = asyncio.create_task(call(hasty, "PING"))
    await asyncio.sleep(0)
    os.kill(pid_of(redis), signal.SIGSTOP)
    await asyncio.sleep(SHORT_S / 4)
    os.kill(pid_of(redis), signal.SIGCONT)
    blocked = asyncio.create_task(call(hasty, "PING"))
    await asyncio.sleep(0)
    signal.sigtimedwait([], 2 * SHORT_S)  # stands still, as a stopped process does
    assert await asyncio.gather(waiting, blocked) == [b"PONG", b"PONG"]
    assert hasty.is_up


async def test_a_hung_redis_that_reads_nothing_leaves_nothing_behind(
    hasty: Lane, redis: EmbeddedRedis
) -> None:
    writer = hasty._writer
    assert writer is not None
    os.kill(pid_of(redis), signal.SIGSTOP)
    large = packed([("SET", "large", b"x" * 5_000_000)])
    outcomes = await asyncio.gather(*(hasty.call(large) for _ in range(30)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {foreign.TimeoutError, RedisUnavailable}
    assert any("too many" in str(outcome) for outcome in outcomes), "bytes are bounded"
    await until("it is down", lambda: ok(not hasty.is_up))
    assert (hasty._waiting_bytes, hasty._unsent) == (0, [])
    async with asyncio.timeout(10):
        await writer.wait_closed()


async def test_a_server_that_ended_refuses_at_once_until_it_is_back(tmp_path: Path) -> None:
    first = await EmbeddedRedis(tmp_path, persist=False).__aenter__()
    lane = Lane(first.url, timeout_s=PATIENT_S, max_in_flight=1000)
    attempts: list[float] = []
    opened = lane._opened

    async def counted(patience_s: float) -> Any:
        attempts.append(patience_s)
        return await opened(patience_s)

    lane._opened = counted  # type: ignore[method-assign]
    await call(lane, "PING")
    await first.__aexit__(None, None, None)
    await until("it is down", lambda: ok(not lane.is_up))
    before = len(attempts)
    for _ in range(500):
        refused = asyncio.create_task(call(lane, "PING"))
        await asyncio.sleep(0)
        assert isinstance(refused.exception(), foreign.ConnectionError)
    assert len(attempts) <= before + 1, "callers must not make attempts"
    assert not lane._waiting
    async with EmbeddedRedis(tmp_path, persist=False):
        await until("it resumes without traffic", lambda: ok(lane.is_up))
        assert await call(lane, "PING") == b"PONG"
        await lane.close()


async def test_a_server_that_was_never_there_refuses_at_once_with_the_reason(tmp_path: Path) -> None:
    lane = Lane(f"unix://{tmp_path}/none.sock", timeout_s=PATIENT_S, max_in_flight=10)
    with pytest.raises(foreign.ConnectionError, match="No such file"):
        await call(lane, "PING")
    assert not lane.is_up
    with pytest.raises(foreign.ConnectionError, match="No such file"):
        await call(lane, "PING")
    await lane.close()


async def test_a_server_that_loads_its_data_counts_as_away(tmp_path: Path) -> None:
    loading = [True]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while command := await reader.readuntil(b"\r\n"):
                words = [await reader.readuntil(b"\r\n") for _ in range(2 * int(command[1:]))][1::2]
                said = b"+OK\r\n" if words[0] == b"CLIENT\r\n" else b"+PONG\r\n"
                if loading[0] and words[0] == b"PING\r\n":
                    said = b"-LOADING Redis is loading the dataset in memory\r\n"
                writer.write(said)
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    lane = Lane(f"unix://{tmp_path}/s", timeout_s=PATIENT_S, max_in_flight=10)
    with pytest.raises(foreign.BusyLoadingError):
        await call(lane, "GET", "k")
    assert not lane.is_up
    with pytest.raises(foreign.BusyLoadingError):
        await call(lane, "GET", "k")
    loading[0] = False
    await until("it resumes", lambda: ok(lane.is_up))
    assert await call(lane, "PING") == b"PONG"
    loading[0] = True  # as a replica that copies its master's data afresh
    with pytest.raises(foreign.BusyLoadingError):
        await call(lane, "PING")
    assert not lane.is_up
    await lane.close()
    server.close()
    await server.wait_closed()


async def test_more_calls_than_allowed_are_refused_and_the_others_answered(redis: EmbeddedRedis) -> None:
    lane = Lane(redis.url, timeout_s=PATIENT_S, max_in_flight=20)
    outcomes = await asyncio.gather(*(call(lane, "ECHO", i) for i in range(50)), return_exceptions=True)
    assert outcomes[:20] == [b"%d" % i for i in range(20)]
    for outcome in outcomes[20:]:
        assert isinstance(outcome, RedisUnavailable)
        assert "too many calls wait for Redis" in outcome.message
    assert await call(lane, "ECHO", "again") == b"again"
    await lane.close()


async def test_bytes_that_wait_are_bounded(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "MAX_WAITING_BYTES", 1000)
    assert await call(lane, "ECHO", "x" * 5000) == b"x" * 5000, "one call passes whatever its size"
    outcomes = await asyncio.gather(
        *(call(lane, "ECHO", "x" * 600) for _ in range(4)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [bytes, bytes, RedisUnavailable, RedisUnavailable]


async def test_close_fails_what_waits_and_ends_every_task(redis: EmbeddedRedis) -> None:
    before = tasks()
    lane = Lane(redis.url, timeout_s=PATIENT_S, max_in_flight=10)
    waiting = asyncio.create_task(call(lane, "BLPOP", "nothing", 0))
    await until("it is connected", lambda: ok(lane._writer is not None))
    await lane.close()
    with pytest.raises(foreign.ConnectionError, match="closed by this process"):
        await waiting
    with pytest.raises(foreign.ConnectionError, match="closed by this process"):
        await call(lane, "PING")
    assert tasks() == before
    assert lane._watchdog is None or lane._watchdog.cancelled()
    await lane.close()


async def test_close_ends_attempts_to_connect(tmp_path: Path) -> None:
    before = tasks()
    lane = Lane(f"unix://{tmp_path}/none.sock", timeout_s=PATIENT_S, max_in_flight=10)
    with pytest.raises(foreign.ConnectionError):
        await call(lane, "PING")
    await lane.close()
    assert tasks() == before


def test_a_loop_that_ends_leaves_nobody_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedRedis(tmp_path, persist=False) as redis:
            lane = Lane(redis.url, timeout_s=PATIENT_S, max_in_flight=10)
            await call(lane, "PING")
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await until("it ended", lambda: ok(not lane.is_up))
            with pytest.raises(foreign.ConnectionError):
                await call(lane, "PING")

    asyncio.run(main())


async def test_a_defect_fails_what_waits_and_the_next_call_starts_again(
    redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(patience_s: float) -> None:
        raise ZeroDivisionError

    lane = Lane(redis.url, timeout_s=PATIENT_S, max_in_flight=10)
    with monkeypatch.context() as patch:
        patch.setattr(lane, "_opened", broken)
        with pytest.raises(foreign.ConnectionError, match="defect"):
            await call(lane, "PING")
    assert await call(lane, "PING") == b"PONG"
    await lane.close()
