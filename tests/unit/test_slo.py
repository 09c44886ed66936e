"""Promises and budgets by hand-computed counts; names of counts; quantiles."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redismem.slo import (
    BOUNDS_MS,
    BUCKETS,
    GOALS,
    GROUPS,
    Group,
    Histogram,
    Objective,
    bucket_of,
    count_name,
    hit_rate,
    judged,
    latency,
    minute,
    operations,
    outcomes,
    parts_of,
    window,
)

RETRIEVAL = BOUNDS_MS["retrieval"]

#: 100 reads that could be cached, 20 that could not; 60 below 10 ms, 40 to 100, 14 to 150, 6 above a second
READS = {
    "retrieval:search:l1:10": 50,
    "retrieval:search:l2:100": 20,
    "retrieval:search:l3:100": 10,
    "retrieval:get:l3:100": 10,
    "retrieval:search_batch:l3:150": 10,
    "retrieval:list:none:10": 10,
    "retrieval:list:none:150": 4,
    "retrieval:export:none:inf": 6,
}


def histogram(**counts: int) -> Histogram:
    """Retrieval latencies, by buckets such as `ms100` and `inf`."""
    names = [f"ms{bound}" for bound in RETRIEVAL]
    assert set(counts) <= {*names, "inf"}
    return Histogram(RETRIEVAL, tuple(counts.get(name, 0) for name in [*names, "inf"]))


def by_name(hour: dict[str, int], month: dict[str, int], entries: int = 0) -> dict[str, Objective]:
    return {one.name: one for one in judged(hour, month, entries=entries)}


histograms = st.lists(st.integers(0, 10**6), min_size=len(RETRIEVAL) + 1, max_size=len(RETRIEVAL) + 1).map(
    lambda counts: Histogram(RETRIEVAL, tuple(counts))
)


@pytest.mark.parametrize(
    ("q", "ms"),
    [
        (0.25, 5.0),  # 25 of 50 below 10 ms
        (0.5, 10.0),
        (0.75, 50 + 25 * 25 / 30),  # 25 of the 30 between 50 and 75 ms
        (0.8, 75.0),
        (0.9, 100 + 50 * 10 / 20),
        (1.0, 150.0),
        (0.0, 0.0),
    ],
)
def test_a_quantile_lies_within_its_bucket_in_proportion(q: float, ms: float) -> None:
    assert histogram(ms10=50, ms75=30, ms150=20).quantile_ms(q) == pytest.approx(ms)


def test_a_quantile_in_the_open_bucket_is_the_highest_bound() -> None:
    assert histogram(ms10=90, inf=10).quantile_ms(0.95) == 1000.0
    assert histogram(inf=1).quantile_ms(0.0) == 1000.0


def test_a_quantile_of_nothing_is_none() -> None:
    assert histogram().quantile_ms(0.95) is None
    assert histogram().share_above(100) is None


def test_the_share_above_a_bound_is_exact_and_of_other_values_refused() -> None:
    some = histogram(ms100=95, ms150=3, inf=2)
    assert (some.share_above(100), some.share_above(150), some.share_above(1000)) == (0.05, 0.02, 0.02)
    assert histogram(ms100=1).share_above(100) == 0.0
    with pytest.raises(ValueError, match="not in"):
        some.share_above(120)


@given(histograms, st.lists(st.floats(0, 1), min_size=2))
def test_quantiles_grow_with_their_share(some: Histogram, shares: list[float]) -> None:
    values = [some.quantile_ms(q) for q in sorted(shares)]
    if some.count == 0:
        assert set(values) == {None}
    else:
        found = [value for value in values if value is not None]
        assert len(found) == len(values)
        assert all(low <= high for low, high in pairwise(found))
        assert 0 <= found[0] <= found[-1] <= RETRIEVAL[-1]


@given(histograms.filter(lambda some: some.count), st.sampled_from([0.5, 0.9, 0.95, 0.99]), st.integers(0, 8))
def test_a_quantile_is_within_a_bound_just_when_few_enough_are_above_it(
    some: Histogram, q: float, at: int
) -> None:
    bound = RETRIEVAL[at]
    value, above = some.quantile_ms(q), sum(some.counts[at + 1 :])
    assert value is not None
    # in whole numbers: above <= (1 - q) of all
    assert (value <= bound) == (100 * above <= round(100 - 100 * q) * some.count)


def test_quantiles_of_whole_shares_do_not_reach_into_the_next_bucket() -> None:
    for hundreds in range(1, 300):
        some = histogram(ms100=95 * hundreds, ms200=4 * hundreds, ms500=hundreds)
        assert (some.quantile_ms(0.95), some.quantile_ms(0.99)) == (100.0, 200.0)


def test_a_latency_at_a_bound_is_below_it() -> None:
    assert bucket_of("retrieval", 0.0) == bucket_of("retrieval", 0.01) == "10"
    assert bucket_of("retrieval", 0.0101) == "25"
    assert (bucket_of("context", 0.4), bucket_of("update", 0.4)) == ("400", "500")
    assert (bucket_of("update", 2.0), bucket_of("update", 2.001)) == ("2000", "inf")


def test_names_and_parts_are_inverse() -> None:
    for group, buckets in BUCKETS.items():
        for status in ("l1", "l2", "l3", "none"):
            for bucket in buckets:
                parts = group, "search", status, bucket
                assert parts_of(count_name(*parts)) == parts
    for outcome in ("ok", "client", "refused", "failed"):
        assert parts_of(count_name("requests", "metrics", outcome)) == ("requests", "metrics", outcome)
    assert parts_of(count_name("evictions", "l1_search")) == ("evictions", "l1_search")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "evictions:",
        "requests:search",
        "requests:search:lost",
        "requests::ok",
        "requests:search:ok:10",
        "retrieval:search:l4:10",
        "retrieval:search:l1:400",  # a bound of contexts
        "retrieval:search:l1:10.0",
        "retrieval::l1:10",
        "misses:search:l1:10",
    ],
)
def test_other_names_are_ignored_and_never_made(name: str) -> None:
    assert parts_of(name) == ()
    with pytest.raises(ValueError, match="no name of a count"):
        count_name(*name.split(":"))
    assert judged({name: 7}, {name: 7}, entries=7) == judged({}, {}, entries=7)
    assert operations({name: 7}) == []


def test_a_part_with_a_colon_makes_no_name() -> None:
    with pytest.raises(ValueError, match="no name of a count"):
        count_name("requests", "search:ok")


def test_every_operation_is_in_the_group_whose_promise_it_is() -> None:
    expected = {
        "retrieval": "search search_batch get list history export session_get"
        " profile topics summary similar conflicts",
        "context": "context context_batch context_stream",
        "update": "put patch delete correct forget import profile_patch message typing"
        " session_open session_patch session_close",
    }
    assert {name: group for group, names in expected.items() for name in names.split()} == GROUPS
    assert set(BOUNDS_MS) == set(get_args(Group))


def test_latencies_add_up_over_operations_or_some_of_them() -> None:
    # 10, 25, 50, 75, 100, 150, 200, 300, 500, 1000, inf
    assert latency(READS, "retrieval").counts == (60, 0, 0, 0, 40, 14, 0, 0, 0, 0, 6)
    assert latency(READS, "retrieval", {"search"}).counts == (50, 0, 0, 0, 30, 0, 0, 0, 0, 0, 0)
    assert latency(READS, "context").count == 0
    assert len(latency(READS, "context").counts) == 12


def test_the_hit_rate_leaves_out_what_cannot_be_cached() -> None:
    assert hit_rate(READS) == 0.7
    assert hit_rate({"retrieval:list:none:10": 5, "context:context:l1:10": 5}) is None


def test_requests_count_for_the_group_of_their_operation() -> None:
    counts = {
        "requests:search:ok": 3,
        "requests:get:ok": 2,
        "requests:put:failed": 1,
        "requests:metrics:ok": 9,
    }
    assert outcomes(counts, "retrieval") == {"ok": 5}
    assert outcomes(counts, "update") == {"failed": 1}
    assert outcomes(counts, "context").total() == 0


def test_the_goals_are_those_of_the_specification() -> None:
    assert [(goal.name, goal.about, goal.comparison, goal.target, goal.allowed) for goal in GOALS] == [
        ("retrieval_p95", "memory_retrieval", "below", 100, 0.05),
        ("retrieval_p99", "memory_retrieval", "below", 200, 0.01),
        ("retrieval_availability", "memory_retrieval", "above", 0.999, 0.001),
        ("retrieval_errors", "memory_retrieval", "below", 0.001, 0.001),
        ("context_p95", "context_assembly", "below", 200, 0.05),
        ("context_p99", "context_assembly", "below", 400, 0.01),
        ("update_p95", "memory_update", "below", 500, 0.05),
        ("update_success", "memory_update", "above", 0.9995, 0.0005),
        ("cache_hit_rate", "cache", "above", 0.70, 0.30),
        ("cache_eviction_rate", "cache", "below", 0.05, None),
    ]
    assert all(goal.target in BOUNDS_MS[goal.group] for goal in GOALS if goal.measure == "latency")


def test_without_data_nothing_is_kept_or_broken() -> None:
    found = judged({}, {}, entries=0)
    assert len(found) == len(GOALS)
    assert {(one.value, one.met, one.samples, one.budget) for one in found} == {(None, None, 0, None)}


def test_latency_is_judged_by_the_hour_and_its_budget_by_the_month() -> None:
    month = {"retrieval:search:l3:100": 990, "retrieval:search:l3:200": 5, "retrieval:search:l3:500": 5}
    found = by_name({"retrieval:search:l1:10": 90, "retrieval:search:l3:200": 10}, month)
    p95 = found["retrieval_p95"]
    # the 95th of 100 is the fifth of the ten between 150 and 200 ms
    assert (p95.value, p95.unit, p95.met, p95.samples, p95.window) == (175.0, "ms", False, 100, "1h")
    assert p95.budget is not None
    assert (p95.budget.window, p95.budget.allowed, p95.budget.spent) == ("30d", 0.05, 0.01)
    assert p95.budget.left == pytest.approx(0.8)
    p99 = found["retrieval_p99"]
    assert (p99.value, p99.met) == (195.0, True)
    assert p99.budget is not None
    assert (p99.budget.spent, p99.budget.left) == (0.005, 0.5)


def test_a_budget_that_is_overspent_is_negative() -> None:
    budget = by_name({}, {"context:context_stream:none:400": 9, "context:context:none:150": 11})[
        "context_p95"
    ]
    assert budget.value is None
    assert budget.met is None
    assert budget.budget is not None
    assert budget.budget.spent == 0.45
    assert budget.budget.left == pytest.approx(-8)


def test_refusals_cost_availability_and_failures_both() -> None:
    counts = {
        "requests:search:ok": 9_970,
        "requests:search:client": 15,
        "requests:get:refused": 10,
        "requests:list:failed": 5,
        "requests:put:failed": 1000,
    }
    found = by_name(counts, counts)
    available, errors = found["retrieval_availability"], found["retrieval_errors"]
    assert (available.value, available.met, available.samples) == (0.9985, False, 10_000)
    assert available.budget is not None
    assert available.budget.spent == 0.0015
    assert available.budget.left == pytest.approx(-0.5)
    assert (errors.value, errors.met) == (0.0005, True)
    assert errors.budget is not None
    assert errors.budget.left == pytest.approx(0.5)


def test_updates_succeed_unless_they_are_refused_or_fail() -> None:
    counts = {"requests:put:ok": 9_990, "requests:delete:client": 6, "requests:message:refused": 3}
    assert by_name(counts | {"requests:forget:failed": 1}, {})["update_success"].value == pytest.approx(
        0.9996
    )
    assert by_name(counts | {"requests:forget:failed": 5}, {})["update_success"].met is False


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("retrieval_p95", {"retrieval:search:l3:100": 95, "retrieval:search:l3:200": 5}),
        ("retrieval_availability", {"requests:get:ok": 999, "requests:get:refused": 1}),
        ("retrieval_errors", {"requests:get:ok": 999, "requests:get:failed": 1}),
        ("update_success", {"requests:put:ok": 1999, "requests:put:failed": 1}),
        ("cache_hit_rate", {"retrieval:get:l1:10": 7, "retrieval:get:l3:10": 3}),
    ],
)
def test_a_value_at_its_target_is_met_with_the_whole_budget(name: str, counts: dict[str, int]) -> None:
    exact = by_name(counts, counts)[name]
    assert (exact.value, exact.met) == (exact.target, True)
    assert exact.budget is not None
    assert exact.budget.left == pytest.approx(0, abs=1e-9)
    worse = {key: count + (key == list(counts)[-1]) for key, count in counts.items()}
    assert by_name(worse, worse)[name].met is False


def test_misses_spend_the_budget_of_the_hit_rate() -> None:
    found = by_name(READS, {"retrieval:get:l2:10": 85, "retrieval:get:l3:10": 15})["cache_hit_rate"]
    assert (found.value, found.met, found.samples) == (0.7, True, 100)
    assert found.budget is not None
    assert (found.budget.allowed, found.budget.spent, found.budget.left) == (0.3, 0.15, 0.5)


def test_evictions_are_judged_by_the_entries_held_and_have_no_budget() -> None:
    hour = {"evictions:l1_search": 30, "evictions:l1_vector": 10}
    found = by_name(hour, hour, entries=1000)["cache_eviction_rate"]
    assert (found.value, found.met, found.samples, found.budget) == (0.04, True, 1000, None)
    assert by_name(hour, hour, entries=500)["cache_eviction_rate"].met is False
    assert by_name({}, {}, entries=500)["cache_eviction_rate"].value == 0.0


def test_objectives_are_ready_to_be_a_reply() -> None:
    [first, *_] = msgspec.json.decode(msgspec.json.encode(judged(READS, READS, entries=1)))
    assert list(first) == [
        *("name", "about", "what", "unit", "comparison", "target", "window"),
        *("value", "met", "samples", "budget"),
    ]
    assert list(first["budget"]) == ["window", "allowed", "spent", "left"]


def test_a_window_tells_of_reads_only() -> None:
    found = window(READS | {"context:context:none:inf": 1000}, 60)
    assert (found.count, found.per_second, found.hit_rate) == (120, 2.0, 0.7)
    assert found.p50_ms == 10.0
    # the 114th is the last of the 14 between 100 and 150 ms
    assert (found.p95_ms, found.p99_ms) == (150.0, 1000.0)
    empty = window({}, 60)
    assert (empty.count, empty.per_second, empty.p50_ms, empty.hit_rate) == (0, 0.0, None, None)


def test_a_minute_tells_when_it_began_and_how_many_failed() -> None:
    found = minute(1_800_000_000, READS | {"requests:search:failed": 2, "requests:put:failed": 5})
    assert (found.at, found.count, found.errors, found.p50_ms) == (1_800_000_000, 120, 2, 10.0)
    empty = minute(0, {})
    assert (empty.count, empty.errors, empty.p95_ms) == (0, 0, None)


def test_operations_come_most_frequent_first_with_those_that_only_failed() -> None:
    requests = {
        "requests:search:ok": 80,
        "requests:get:ok": 10,
        "requests:put:failed": 10,
        "requests:context:ok": 12,
        "requests:context:refused": 3,
        "requests:metrics:ok": 500,
    }
    found = operations(READS | requests | {"context:context:none:200": 12, "evictions:search": 4})
    rows = [(row.operation, row.group, row.count, row.failed) for row in found]
    assert rows[:4] == [
        ("search", "retrieval", 80, 0),
        ("context", "context", 15, 0),
        ("get", "retrieval", 10, 0),
        ("put", "update", 10, 10),
    ]
    search, context, get, put = found[:4]
    assert (search.hit_rate, search.p50_ms) == (0.875, 8.0)
    assert (context.hit_rate, context.p50_ms, get.hit_rate) == (None, 175.0, 0.0)
    assert (put.p50_ms, put.p99_ms, put.hit_rate) == (None, None, None)
