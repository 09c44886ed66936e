from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest
from redis import exceptions as foreign

from redismem.client import MAX_FAST_BYTES, MAX_FAST_COMMANDS, Client, FunctionMissing, ours
from redismem.embedded import EmbeddedRedis
from redismem.errors import (
    Misconfigured,
    RedisMemError,
    RedisUnavailable,
    StoreError,
    WritesRefused,
)
from redismem.settings import Settings
from tests.conftest import until


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    async with EmbeddedRedis(tmp_path, persist=False) as opened:
        yield opened


@pytest.fixture
async def client(redis: EmbeddedRedis) -> AsyncIterator[Client]:
    opened = Client(Settings(), redis.url)
    yield opened
    await opened.close()


async def connections(client: Client) -> int:
    rows = (await client.execute("CLIENT", "LIST")).decode().splitlines()
    return sum(" name=redismem " in row for row in rows)


async def test_a_pipeline_returns_replies_in_order(client: Client) -> None:
    assert await client.pipeline([("SET", "k", 1), ("INCR", "k"), ("GET", "k")]) == [b"OK", 2, b"2"]
    assert await client.pipeline([]) == []


async def test_an_error_in_a_pipeline_is_ours_and_the_rest_is_done(client: Client) -> None:
    with pytest.raises(StoreError, match="WRONGTYPE") as caught:
        await client.pipeline([("SET", "k", "v"), ("LPUSH", "k", 1), ("NONSENSE",), ("SET", "l", 1)])
    assert isinstance(caught.value.__cause__, foreign.ResponseError)
    assert await client.execute("GET", "l") == b"1"


async def test_many_callers_share_one_connection(client: Client) -> None:
    await asyncio.gather(*(client.execute("SET", f"k{i}", i) for i in range(200)))
    assert await connections(client) == 1


@pytest.mark.parametrize(
    "commands",
    [[("SET", "k", b"x" * MAX_FAST_BYTES)], [("SET", "k", 1)] * (MAX_FAST_COMMANDS + 1)],
    ids=["large", "many"],
)
async def test_what_is_long_goes_over_a_connection_of_its_own(
    client: Client, commands: list[tuple[str | bytes | int, ...]]
) -> None:
    await client.pipeline(commands[:1] if len(commands) > 1 else [("PING",)])
    assert await connections(client) == 1
    await client.pipeline(commands)
    assert await connections(client) == 2


async def test_a_blocked_bulk_call_does_not_stand_in_front_of_a_small_one(client: Client) -> None:
    blocked = asyncio.create_task(client.pipeline([("BLPOP", "nothing", 0), ("SET", "k", "x" * 20_000)]))
    for number in range(20):
        assert await client.execute("ECHO", number) == b"%d" % number
    assert not blocked.done()
    await client.execute("LPUSH", "nothing", "a")
    assert await blocked == [[b"nothing", b"a"], b"OK"]


async def test_calls_in_flight_are_bounded_for_both_connections_together(redis: EmbeddedRedis) -> None:
    client = Client(Settings(redis_in_flight=40), redis.url)
    small = [client.execute("ECHO", "a") for _ in range(60)]
    large = [client.execute("ECHO", "a" * MAX_FAST_BYTES) for _ in range(60)]
    outcomes = await asyncio.gather(*small, *large, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, RedisUnavailable)]
    assert len(refused) == 80
    assert {error.message for error in refused} == {"too many calls wait for Redis"}
    await client.close()


def with_password(url: str, password: str, user: str = "") -> str:
    return url.replace("unix://", f"unix://{user}:{quote(password, safe='')}@")


async def test_the_password_of_the_url_is_used_and_a_wrong_one_is_misconfigured(
    redis: EmbeddedRedis, client: Client
) -> None:
    password = "s3cret/@:%"
    await client.execute("CONFIG", "SET", "requirepass", password)
    right = Client(Settings(), with_password(redis.url, password))
    assert await right.execute("PING") == b"PONG"
    for wrong in (with_password(redis.url, "no"), redis.url):
        refused = Client(Settings(), wrong)
        for _ in range(2):
            with pytest.raises(Misconfigured, match="Redis refused the credentials of REDISMEM_REDIS_URL"):
                await refused.execute("PING")
        assert not refused.is_up
        await refused.close()
    await right.execute("CONFIG", "SET", "requirepass", "")
    await right.close()


async def test_a_password_that_is_corrected_on_the_server_is_noticed(
    redis: EmbeddedRedis, client: Client
) -> None:
    await client.execute("CONFIG", "SET", "requirepass", "new")
    early = Client(Settings(), with_password(redis.url, "later"))
    with pytest.raises(Misconfigured):
        await early.execute("PING")
    await client.execute("CONFIG", "SET", "requirepass", "later")
    await until("it is up", lambda: asyncio.sleep(0, early.is_up))
    assert await early.execute("PING") == b"PONG"
    await early.close()


async def test_the_database_of_the_url_is_selected(redis: EmbeddedRedis, client: Client) -> None:
    other = Client(Settings(), redis.url.replace("db=0", "db=3"))
    await other.execute("SET", "k", "three")
    assert await client.execute("GET", "k") is None
    assert await other.execute("GET", "k") == b"three"
    await other.close()


async def test_options_of_a_pool_in_the_url_are_ignored(redis: EmbeddedRedis) -> None:
    odd = Client(Settings(), redis.url + "&max_connections=3&timeout=1&decode_responses=True&protocol=3")
    assert await odd.execute("ECHO", b"\xff") == b"\xff"
    await odd.close()


async def test_without_redis_calls_are_refused_with_the_reason_and_is_up_tells(tmp_path: Path) -> None:
    client = Client(Settings(), f"unix://{tmp_path}/none.sock")
    assert client.is_up
    assert client.retry_after_s == 0
    for _ in range(3):
        with pytest.raises(RedisUnavailable, match="cannot answer now: it cannot be reached") as caught:
            await client.execute("PING")
        assert "No such file" in caught.value.detail
        assert "none.sock" not in caught.value.message  # it is sent to callers
    assert not client.is_up
    assert 0 <= client.retry_after_s <= 2
    await client.close()


async def test_after_close_calls_are_refused(redis: EmbeddedRedis, client: Client) -> None:
    await client.execute("PING")
    await client.close()
    with pytest.raises(RedisUnavailable) as caught:
        await client.execute("PING")
    assert "closed by this process" in caught.value.detail


async def test_a_missing_function_is_told_apart(client: Client) -> None:
    with pytest.raises(FunctionMissing):
        await client.execute("FCALL", "rm_nothing", 0)


async def test_a_full_redis_refuses_writes_and_answers_reads(client: Client) -> None:
    await client.execute("SET", "k", "v")
    await client.execute("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(WritesRefused):
        await client.execute("SET", "k", "w")
    with pytest.raises(WritesRefused):
        await client.execute("EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "k")
    assert await client.execute("GET", "k") == b"v"
    assert client.is_up


async def test_a_replica_refuses_writes_and_answers_reads(client: Client) -> None:
    await client.execute("CONFIG", "SET", "replica-serve-stale-data", "yes")
    await client.execute("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(WritesRefused):
        await client.execute("SET", "k", "w")
    assert await client.execute("GET", "k") is None
    await client.execute("CONFIG", "SET", "replica-serve-stale-data", "no")
    with pytest.raises(RedisUnavailable, match="not ready") as caught:
        await client.execute("GET", "k")
    assert "MASTER" in caught.value.detail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (foreign.AuthenticationError("invalid"), Misconfigured),
        (foreign.NoPermissionError("no"), Misconfigured),
        (foreign.BusyLoadingError("loading"), RedisUnavailable),
        (foreign.MasterDownError("MASTERDOWN"), RedisUnavailable),
        (foreign.ClusterDownError("down"), RedisUnavailable),
        (foreign.TryAgainError("again"), RedisUnavailable),
        (foreign.TimeoutError("late"), RedisUnavailable),
        (foreign.ReadOnlyError("replica"), WritesRefused),
        (foreign.OutOfMemoryError("full"), WritesRefused),
        (foreign.ResponseError("MISCONF Redis cannot persist"), WritesRefused),
        (foreign.ResponseError("NOREPLICAS Not enough good replicas"), WritesRefused),
        (foreign.ResponseError("ERR Function not found"), FunctionMissing),
        (foreign.ResponseError("RMEM_USAGE x"), StoreError),
        (foreign.DataError("x"), StoreError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_every_error_of_redis_py_becomes_ours(error: foreign.RedisError, kind: type[RedisMemError]) -> None:
    assert type(ours(error)) is kind
