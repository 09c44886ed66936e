"""The history of counts on a real Redis: sums, periods, how long they are kept, foreign hands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from redismem.errors import StoreError
from redismem.keys import series_keys
from redismem.lualib import Functions
from redismem.series import KEPT_S, Series
from redismem.service import Service

#: 2027-01-15 08:00:25 UTC
NOW_S = 1_800_000_025.5
MINUTE_S, DAY_S = 60, 86_400


@pytest.fixture
def series(service: Service) -> Series:
    return Series(service.functions)


async def held(service: Service, key: str) -> dict[bytes, bytes]:
    flat = await service.client.execute("HGETALL", key)
    return dict(zip(flat[::2], flat[1::2], strict=True))


def test_keys_are_of_the_minute_and_the_day() -> None:
    assert series_keys(NOW_S) == (
        "redismem:series:{ops}:m:30000000",
        "redismem:series:{ops}:d:20833",
    )
    assert series_keys(NOW_S + 34) == series_keys(NOW_S)
    assert series_keys(NOW_S + 35)[0] == "redismem:series:{ops}:m:30000001"


async def test_a_count_is_added_to_each_period_and_kept_as_long_as_it_is_read(
    service: Service, series: Series
) -> None:
    await series.add({"requests:get:ok": 3, "evictions:l1_search": 1}, NOW_S)
    await series.add({"requests:get:ok": 4}, NOW_S)
    for key, kept_s in zip(series_keys(NOW_S), KEPT_S, strict=True):
        assert await held(service, key) == {b"requests:get:ok": b"7", b"evictions:l1_search": b"1"}
        assert kept_s - 10 < await service.client.execute("TTL", key) <= kept_s
    assert KEPT_S == (7_200, 2_764_800)


async def test_minutes_come_oldest_first_with_empty_ones_and_the_running_one(
    service: Service, series: Series, round_trips: Any
) -> None:
    await series.add({"requests:get:ok": 9}, NOW_S - 4 * MINUTE_S)
    await series.add({"requests:get:ok": 1}, NOW_S - 3 * MINUTE_S)
    await series.add({"requests:get:ok": 2}, NOW_S - MINUTE_S)
    await series.add({"requests:put:ok": 3}, NOW_S)
    with round_trips() as sent:
        found = await series.minutes(NOW_S, 4)
    assert sent == ["pipeline"]
    assert found == [
        (1_799_999_820, {"requests:get:ok": 1}),
        (1_799_999_880, {}),
        (1_799_999_940, {"requests:get:ok": 2}),
        (1_800_000_000, {"requests:put:ok": 3}),
    ]
    assert found[0][1].total() == 1
    assert await series.minutes(NOW_S, 0) == []


async def test_days_are_summed_over_the_days_that_are_asked_for(
    service: Service, series: Series, round_trips: Any
) -> None:
    for ago, count in ((0, 1), (1, 10), (29, 100), (30, 1000)):
        # 08:00, and 09:00 of the days before
        moment_s = NOW_S - ago * DAY_S + (3600 if ago else 0)
        await series.add({"requests:get:ok": count, f"requests:get{ago}:ok": 1}, moment_s)
    with round_trips() as sent:
        found = await series.days(NOW_S, 30)
    assert sent == ["pipeline"]
    assert found["requests:get:ok"] == 111
    assert found["requests:get29:ok"] == 1
    assert "requests:get30:ok" not in found
    assert await series.days(NOW_S - 100 * DAY_S, 30) == {}


async def test_what_many_processes_add_at_once_adds_up(service: Service) -> None:
    writers = [Series(Functions(service.client)) for _ in range(2)]
    await asyncio.gather(
        *(
            writer.add({"requests:get:ok": 1, f"requests:get:{at}": 2}, NOW_S)
            for at, writer in enumerate(writers * 50)
        )
    )
    [(_, found)] = await writers[0].minutes(NOW_S, 1)
    assert found["requests:get:ok"] == 100
    assert found.total() == 100 + 2 * 100


async def test_many_names_go_in_one_round_trip_and_none_in_no_one(
    service: Service, series: Series, round_trips: Any
) -> None:
    counts = {f"requests:operation{number}:ok": number + 1 for number in range(2500)}
    with round_trips() as sent:
        await series.add(counts, NOW_S)
    assert sent == ["pipeline"]
    assert await series.days(NOW_S, 1) == counts
    with round_trips() as sent:
        await series.add({"requests:get:ok": 1}, NOW_S)
    assert sent == ["FCALL"]
    with round_trips() as sent:
        await series.add({}, NOW_S)
        await series.add({"requests:get:ok": 0}, NOW_S)
    assert sent == []


async def test_what_a_foreign_hand_wrote_does_not_hide_or_stop_counts(
    service: Service, series: Series
) -> None:
    for key in series_keys(NOW_S):
        await service.client.execute(
            "HSET", key, "requests:get:ok", "many", "seen", "1.5", b"\xff", 2, "full", 2**63 - 1
        )
    await series.add({"requests:put:ok": 1, "full": 5}, NOW_S)
    expected = {"requests:put:ok": 1, "\ufffd": 2, "full": 5}
    assert await series.minutes(NOW_S, 1) == [(1_800_000_000, expected)]
    await series.add({"requests:get:ok": 3}, NOW_S)
    assert await series.days(NOW_S, 1) == expected | {"requests:get:ok": 3}


@pytest.mark.parametrize("at", [0, 1])
async def test_a_key_of_a_foreign_type_is_named_and_nothing_is_written(
    service: Service, series: Series, at: int
) -> None:
    key = series_keys(NOW_S)[at]
    await service.client.execute("SET", key, "foreign", "EX", 60)
    with pytest.raises(StoreError, match=f"RMEM_TYPE {key}"):
        await series.add({"requests:get:ok": 1}, NOW_S)
    assert await service.client.execute("KEYS", "redismem:series:*") == [key.encode()]


@pytest.mark.parametrize(
    "args",
    [
        [],
        [60, 60],
        [60, 60, "name"],
        [60, 60, "name", 0],
        [60, 60, "name", -1],
        [60, 60, "name", 1, "other"],
        [60, 60, "name", 1, "other", "x"],
        [60, 60, "name", 2**53 + 2],
        [0, 60, "name", 1],
        [60, "nan", "name", 1],
        [60, 1e10, "name", 1],
        [60, 60, *["name", 1] * 1001],
    ],
)
async def test_a_wrong_argument_is_misuse_and_writes_nothing(service: Service, args: list[Any]) -> None:
    with pytest.raises(StoreError, match="RMEM_USAGE rm_count"):
        await service.functions.call("rm_count_v1", series_keys(NOW_S), *args)
    with pytest.raises(StoreError, match="RMEM_USAGE rm_count"):
        await service.functions.call("rm_count_v1", series_keys(NOW_S)[:1], 60, 60, "name", 1)
    assert await service.client.execute("KEYS", "redismem:series:*") == []


async def test_a_reply_tells_how_many_names_were_added(service: Service) -> None:
    pairs = [item for number in range(1000) for item in (f"n{number}", 1)]
    assert await service.functions.call("rm_count_v1", series_keys(NOW_S), 60, 60, *pairs) == [
        b"OK",
        1000,
    ]


async def test_after_a_function_flush_counts_are_added_once(service: Service, series: Series) -> None:
    await service.client.execute("FUNCTION", "FLUSH")
    await series.add({f"requests:operation{number}:ok": 1 for number in range(1500)}, NOW_S)
    assert (await series.days(NOW_S, 1)).total() == 1500
